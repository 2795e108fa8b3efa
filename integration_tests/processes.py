"""The processes of a job: the environment they get, how they start, how they end."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from integration_tests.nursery import Child, Nursery, Task

ROOT = Path(__file__).resolve().parent.parent
# one for each venv: the build's flags name its paths, and two venvs in one folder rebuild for ever
EXTENSIONS = ROOT / ".cache" / f"torch_extensions_{zlib.crc32(sys.prefix.encode()):08x}"
BUILD_SECONDS = 600
Process = subprocess.Popen[bytes] | Child


def base_environment() -> dict[str, str]:
    """This process's environment made fit for a job: CPU, one thread, nothing left over from another job."""
    launchers = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_",
        "TORCHELASTIC_",
        "GROUP_",
        "ROLE_",
        "OMPI_",
        "SLURM_",
        "ACCELERATE_",
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return {
        **kept,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
    }


@lru_cache
def warm_extensions() -> None:
    """Compile DeepSpeed's CPU communication op once, before many ranks want it at the same time.

    The build's own lock is a file that a killed build leaves behind, on which all later ones would wait for
    ever; ours ends with its process, so whoever holds it may remove the other.
    """
    EXTENSIONS.mkdir(parents=True, exist_ok=True)
    done = EXTENSIONS / "done"
    with (EXTENSIONS / "warm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return
        for stale in EXTENSIONS.rglob("lock"):
            stale.unlink()
        code = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
        build = spawn([sys.executable, "-c", code], base_environment(), EXTENSIONS / "build")
        try:
            if build.wait(timeout=BUILD_SECONDS) != 0:
                log = (EXTENSIONS / "build.stderr").read_text()
                raise RuntimeError(f"DeepSpeed's CPU communication op does not build:\n{log}")
        finally:
            signal_tree(build, signal.SIGKILL)
        done.touch()


@lru_cache
def nursery() -> Nursery:
    """The one of this process; with the first job starts a mother for all of pytest's workers, who ends with pytest."""
    imports = ["torch", "deepspeed"]
    if importlib.util.find_spec("transformers") is not None:
        imports += ["transformers.models.llama.modeling_llama", "transformers.trainer"]
        imports += ["integration_tests.warming:conversions"]
    # What every process would import once it is under way: with the first group, with the first ZeRO or 16-bit
    # optimizer (two seconds of CPU, torch's compiler among it), and Sentinel, whose import alone changes nothing.
    imports += ["torch.utils.cpp_extension"]
    there = importlib.util.find_spec("deepspeed")
    if there and there.origin and Path(there.origin).with_name("runtime").joinpath("zero", "muon").is_dir():
        imports += ["deepspeed.runtime.zero.muon.muon_optimizer"]  # DeepSpeed 0.16 has none
    imports += ["deepspeed_sentinel.engine.launch", "cryptography.hazmat.backends.openssl"]
    imports += ["integration_tests.warming:engine"]
    shared: dict[str, Any] = {}
    if session := os.environ.get("PYTEST_XDIST_TESTRUNUID"):
        shared = {"meeting": Path(tempfile.gettempdir(), f"nursery_{session}"), "owner": os.getppid()}
    started = Nursery(base_environment(), imports, ROOT, **shared)
    atexit.register(started.close)
    return started


def start_rank(target: str, module: bool, args: Sequence[str], environment: Mapping[str, str], logs: Path) -> Process:
    """A process of the nursery, or a fresh one if imports could come out otherwise with this environment."""
    if not nursery().fits(environment):
        return spawn([sys.executable, "-u", *(["-m"] if module else []), target, *args], environment, logs)
    files = [Path(f"{logs}.{stream}") for stream in ("stdout", "stderr")]
    for file in files:
        file.write_bytes(b"")
    return nursery().start(Task(target, module, args, environment, str(ROOT), *map(str, files)))


def spawn(command: Sequence[str], environment: Mapping[str, str], logs: Path) -> subprocess.Popen[bytes]:
    with Path(f"{logs}.stdout").open("wb") as stdout, Path(f"{logs}.stderr").open("wb") as stderr:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


def signal_tree(process: Process, sent: signal.Signals) -> None:
    # torchrun puts each of its workers into a session of its own, so the group alone is not enough
    if process.poll() is not None:
        return
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sent)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(sent)


def free_port() -> int:
    # Below the ports that the system hands out by itself: a job binds its port only after seconds of imports, and
    # gloo opens many connections meanwhile.
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
