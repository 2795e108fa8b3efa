"""Starts the demo's one job and makes sure that it ends with the parent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspeed_sentinel.demo.options import DemoOptions

_PATIENCE_S = 10.0


def environment(options: DemoOptions) -> dict[str, str]:
    """The job's environment: on CPU one thread a process, since the processes share the cores."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if options.device == "cpu":
        variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if sys.platform == "linux":
            # Machines without a resolvable host name still have the loopback interface.
            variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return variables


@contextmanager
def job(options: DemoOptions, options_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The running job; on leaving the block, all of its processes are gone."""
    with options.job_log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deepspeed_sentinel.demo.worker", str(options_file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(options),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate the job and every process it started."""
    import psutil

    if process.poll() is not None:
        return
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for worker in family:
        _quietly(worker.kill)
    process.terminate()
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for worker in family:
        _quietly(worker.kill)


def _quietly(kill: Callable[[], None]) -> None:
    import psutil

    try:
        kill()
    except psutil.NoSuchProcess:
        return


def error_tail(log: Path, lines: int = 40) -> str:
    """The end of the job's log, from its first traceback on where there is one."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    first = next((index for index, line in enumerate(text) if "Traceback (most recent call last)" in line), None)
    if first is None:
        return "\n".join(text[-lines:])
    # All ranks fail together and print the same; one traceback tells it.
    return "\n".join(text[first : first + lines])
