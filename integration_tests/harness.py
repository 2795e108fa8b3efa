"""Real DeepSpeed jobs from pytest: start N processes, wait for them, read what they left; always end them.

result = run_job("integration_tests/jobs/scenarios.py", stages=2, replicas=3, folder=tmp_path, args=[...])
with start_job(...) as job:
    job.wait_for(rank=4, text="step 3")
    job.kill(4)
    result = job.wait(timeout=60)
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from integration_tests.processes import (
    ROOT,
    Process,
    base_environment,
    free_port,
    signal_tree,
    spawn,
    start_rank,
    warm_extensions,
)

Launcher = Literal["bare", "torchrun", "deepspeed", "accelerate"]


def named(rank: int, replicas: int) -> str:
    """What logs and errors call a worker of a job on this machine's CPU."""
    return f"stage {rank // replicas}, replica {rank % replicas} (rank {rank}, {socket.gethostname()}, cpu)"


@dataclass(frozen=True)
class JobResult:
    """What a finished job left.

    Attributes:
        returncodes: of the processes that were started: one a rank if "bare" (negative: the signal that ended
            it), torchrun's alone otherwise.
        timed_out: it was killed because its time was up.
        seconds: wall-clock time.
        stdout, stderr: a text for each rank.
        results: for each rank the JSON that it wrote, or None.
        folder: where the job wrote.
    """

    returncodes: tuple[int, ...]
    timed_out: bool
    seconds: float
    stdout: tuple[str, ...]
    stderr: tuple[str, ...]
    results: tuple[Any, ...]
    folder: Path

    @property
    def returncode(self) -> int:
        """0 if every process ended with 0, else the first other code."""
        return next((code for code in self.returncodes if code != 0), 0)

    def check(self) -> JobResult:
        """This result, or AssertionError with the ends of all logs if the job failed or ran out of time."""
        if self.returncode != 0 or self.timed_out:
            raise AssertionError(self.describe())
        return self

    def describe(self, lines: int = 25) -> str:
        """Exit codes and the last lines that each rank wrote to stderr."""
        why = "timed out" if self.timed_out else "ended"
        parts = [f"job {why} after {self.seconds:.1f} s with exit codes {list(self.returncodes)}"]
        for rank, text in enumerate(self.stderr):
            parts.append(f"--- rank {rank}, stderr ---\n" + "\n".join(text.splitlines()[-lines:]))
        return "\n".join(parts)


@dataclass
class JobHandle:
    """A job under way. As a context manager it leaves no process behind, whatever happens in the block."""

    stages: int
    replicas: int
    folder: Path
    launcher: Launcher
    processes: list[Process]
    started: float = field(default_factory=time.monotonic)

    def __enter__(self) -> JobHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kill(self, rank: int, sent: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one rank; only for launcher "bare", where each rank is a process of ours."""
        if self.launcher != "bare":
            raise ValueError(f'kill() needs launcher="bare", this job runs under {self.launcher!r}.')
        signal_tree(self.processes[rank], sent)

    def log(self, rank: int, stream: Literal["stdout", "stderr"] = "stdout") -> str:
        """What a rank has written so far."""
        if self.launcher == "bare":
            files = [self.folder / f"{rank}.{stream}"]
        elif self.launcher == "torchrun":
            files = sorted(self.folder.glob(f"torchrun/**/{rank}/{stream}.log"))
        elif self.launcher == "accelerate":
            files = [self.folder / f"launcher.{stream}"]  # of all ranks
        else:
            files = sorted(self.folder.glob(f"deepspeed/*_rank{rank}.log"))
        return "".join(path.read_text(errors="replace") for path in files if path.exists())

    def wait_for(self, rank: int, text: str, timeout: float = 60.0) -> None:
        """Return when a rank has written ``text`` to stdout; AssertionError if it ends or time runs out."""
        deadline = time.monotonic() + timeout
        while text not in self.log(rank):
            ended = all(process.poll() is not None for process in self.processes)
            if time.monotonic() > deadline or (ended and text not in self.log(rank)):
                why = "the job ended" if ended else f"{timeout} s passed"
                self.stop()
                raise AssertionError(f"rank {rank} never wrote {text!r}: {why}\n{self._result(False).describe()}")
            time.sleep(0.05)

    def wait(self, timeout: float = 120.0) -> JobResult:
        """Wait until all processes have ended; after ``timeout`` seconds end them."""
        deadline = time.monotonic() + timeout
        timed_out = False
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                timed_out = True
                break
        self.stop()
        return self._result(timed_out)

    def stop(self) -> None:
        """End every process of the job that still runs, and what these started."""
        for process in self.processes:
            signal_tree(process, signal.SIGKILL)
            process.wait()

    def _result(self, timed_out: bool) -> JobResult:
        ranks = range(self.stages * self.replicas)
        return JobResult(
            returncodes=tuple(process.returncode for process in self.processes),
            timed_out=timed_out,
            seconds=time.monotonic() - self.started,
            stdout=tuple(self.log(rank, "stdout") for rank in ranks),
            stderr=tuple(self.log(rank, "stderr") for rank in ranks),
            results=tuple(_read_json(self.folder / f"{rank}.json") for rank in ranks),
            folder=self.folder,
        )


def start_job(
    script: str | Path,
    stages: int,
    replicas: int,
    *,
    folder: Path,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    launcher: Launcher = "bare",
    module: bool = False,
    restarts: int = 0,
) -> JobHandle:
    """Start ``stages * replicas`` processes of a script on this machine's CPU.

    Args:
        script: path, absolute or from the repository's root.
        stages, replicas: of the mesh; rank = stage * replicas + replica.
        folder: new or empty; for logs and results. Scripts get it as environment variable JOB_FOLDER and
            leave the result of a rank as JOB_FOLDER/<rank>.json.
        args: of the script.
        env: added to the environment, for all ranks.
        launcher: "bare" starts each process with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT,
            as Slurm's srun does; "torchrun" leaves it to torch.distributed.run, "deepspeed" to DeepSpeed's,
            "accelerate" to ``accelerate launch``.
        module: ``script`` is the name of a module to run with ``-m``.
        restarts: how often launcher "torchrun" starts all processes anew after a failure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    warm_extensions()
    size, port = stages * replicas, str(free_port())
    environment = {**base_environment(), "JOB_FOLDER": str(folder), **(env or {})}
    target, args = str(script) if module else str(ROOT / script), [*map(str, args)]
    command = [*(["-m"] if module else []), target, *args]
    processes: list[Process] = []
    job = JobHandle(stages, replicas, folder, launcher, processes)
    try:
        if launcher == "torchrun":
            run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}"]
            run += [
                f"--max-restarts={restarts}",
                f"--master_port={port}",
                f"--log-dir={folder / 'torchrun'}",
                "--redirects=3",
                *command,
            ]
            processes.append(spawn(run, environment, folder / "launcher"))
            return job
        if launcher == "accelerate":
            run = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={size}"]
            run += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
            processes.append(spawn([*run, *command], environment, folder / "launcher"))
            return job
        if launcher == "deepspeed":
            run = [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={size}", f"--master_port={port}"]
            run += [f"--enable_each_rank_log={folder / 'deepspeed'}", *(["--module"] if module else [])]
            processes.append(spawn([*run, *command[module:]], environment, folder / "launcher"))
            return job
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(size):
            own = {**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(start_rank(target, module, args, own, folder / str(rank)))
    except BaseException:
        job.stop()
        raise
    return job


def run_job(
    script: str | Path,
    stages: int,
    replicas: int,
    *,
    folder: Path,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    launcher: Launcher = "bare",
    timeout: float = 120.0,
) -> JobResult:
    """``start_job`` and wait; a job that is not done after ``timeout`` seconds is ended (``timed_out``)."""
    with start_job(script, stages, replicas, folder=folder, args=args, env=env, launcher=launcher) as job:
        return job.wait(timeout)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
