"""Processes that are forked from one warm parent, so that they need not import torch and deepspeed themselves.

The parent, the nursery, has done imports and nothing more: no thread, no group, no tensor. Run as a module, this file
is the mother of nurseries: it imports, and forks one for each process that connects to its socket. ``Nursery`` is that
process's side. Pytest's workers share a mother, who ends with the process that owns her. Over the socket go a line of
JSON for each request and one for each answer:

    {"start": fields of a Task}  ->  pid
    {"poll": pid}                ->  returncode, null while the process runs

When the connection ends, at the latest with pytest itself, its nursery kills what it has started and ends.

Forked processes share the nursery's hash seed, where fresh ones draw one each, unless PYTHONHASHSEED is set. What
imports print is in the nursery's log, not in theirs. They end without taking their modules down, see ``end``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

# All that may differ between a job's environment and the nursery's: torch and transformers read hundreds of variables
# at import, but none of these. Gloo reads its own with the first group.
OF_A_JOB = {"JOB_FOLDER", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST"}
OF_A_JOB |= {"TORCH_GLOO_LAZY_INIT", "PYTEST_XDIST_WORKER"}
PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Task:
    """What a forked process runs, as ``python target args`` or ``python -m target args`` would.

    Attributes:
        target: absolute path of a script, or with ``module`` the name of a module.
        environment: the whole of it.
        folder: working directory.
        stdout, stderr: existing files.
    """

    target: str
    module: bool
    args: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    stdout: str
    stderr: str


class NurseryError(RuntimeError):
    """The nursery did not start or has ended."""


class Nursery:
    """This process's nursery; starts a mother if there is none yet.

    Args:
        environment: of the mother; only jobs with the same one may start here, see ``fits``.
        imports: names of modules, to be imported in this order; "module:function" is called too.
        folder: the repository's root.
        meeting: where processes that share a mother find her; None for one of one's own.
        owner: the process with which she ends; None for this one.

    Attributes:
        pid: the nursery's.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        imports: Sequence[str],
        folder: Path,
        meeting: Path | None = None,
        owner: int | None = None,
    ) -> None:
        meeting = Path(tempfile.mkdtemp(prefix="nursery_")) if meeting is None else meeting
        meeting.mkdir(exist_ok=True)
        self._before = dict(environment)
        with (meeting / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            line = _connection(meeting) or _new_mother(environment, imports, folder, meeting, owner or os.getpid())
        self._requests, self._answers = line.makefile("wb", buffering=0), line.makefile("rb")
        line.close()  # when its files are
        self.pid: int
        self._after: dict[str, str]
        self.pid, self._after = self._answer()

    def fits(self, environment: Mapping[str, str]) -> bool:
        """A fresh process with this environment would have imported the same as the nursery has.

        Imports set some variables, in pytest too: such a one may have its value from before or from after them.
        """
        names = (environment.keys() | self._before.keys()) - OF_A_JOB
        return all(environment.get(name) in (self._before.get(name), self._after.get(name)) for name in names)

    def start(self, task: Task) -> Child:
        """Fork a process for the task."""
        return Child(self, self.ask({"start": dataclasses.asdict(task)}), task.target)

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer to a request."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either, and _answer says so
            self._requests.write(json.dumps(request).encode() + b"\n")
        return self._answer()

    def close(self) -> None:
        """End every process of this nursery."""
        with contextlib.suppress(OSError):  # it has ended already
            socket.socket(fileno=os.dup(self._requests.fileno())).shutdown(socket.SHUT_WR)
        self._answers.read()

    def _answer(self) -> Any:
        with contextlib.suppress(ConnectionResetError):
            if line := self._answers.readline():
                return json.loads(line)
        raise NurseryError("the nursery has ended")


def _connection(meeting: Path) -> socket.socket | None:
    """To the mother who listens there, if one does."""
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(str(meeting / "socket"))
    except (FileNotFoundError, ConnectionRefusedError):
        line.close()
        return None
    return line


def _new_mother(
    environment: Mapping[str, str], imports: Sequence[str], folder: Path, meeting: Path, owner: int
) -> socket.socket:
    """Start her, wait until she listens, and connect."""
    with (meeting / "log").open("wb") as log:
        mother = subprocess.Popen(
            [sys.executable, "-u", "-m", "integration_tests.nursery", str(meeting), str(owner), *imports],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for pytest, which then ends the jobs
        )
    while (line := _connection(meeting)) is None:
        if mother.poll() is not None:
            text = (meeting / "log").read_text(errors="replace")
            shutil.rmtree(meeting)
            raise NurseryError(f"the nursery ended with exit code {mother.returncode}:\n{text}")
        time.sleep(0.02)
    return line


class Child:
    """A process of a nursery, with those parts of ``subprocess.Popen`` that a job needs."""

    def __init__(self, nursery: Nursery, pid: int, args: str) -> None:
        self.pid, self.args = pid, args
        self.returncode: int | Any = None  # as Popen has it
        self._nursery = nursery

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        if self.returncode is None:
            self.returncode = self._nursery.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code once the process has ended; ``subprocess.TimeoutExpired`` if it does not in time."""
        with contextlib.suppress(ProcessLookupError):  # it has ended, and was asked for already
            ended = os.pidfd_open(self.pid)
            try:
                select.select([ended], [], [], timeout)
            finally:
                os.close(ended)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code


def listen(meeting: Path, owner: int) -> socket.socket | None:
    """Fork a nursery for each connection. Returns its connection in each of them, None when the owner has ended."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(meeting / "socket"))
    listener.listen()
    owned = os.pidfd_open(owner)
    with selectors.DefaultSelector() as events:
        events.register(listener, selectors.EVENT_READ)
        events.register(owned, selectors.EVENT_READ)
        while all(key.fileobj is listener for key, _ in events.select()):
            line, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                os.close(owned)
                return line
            line.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    return None


def serve(requests: BinaryIO, answers: BinaryIO, set_by_imports: Mapping[str, str]) -> Task | None:
    """Answer requests until they end. Returns None then, and in every forked process the task that it is for."""
    running: set[int] = set()
    while line := requests.readline():
        request = json.loads(line)
        if "start" in request:
            task = Task(**request["start"])
            ready, entered = os.pipe()
            pid = os.fork()
            if pid == 0:
                # or the nursery's end would not be seen while this process runs
                for pipe in (requests, answers):
                    pipe.close()
                os.close(ready)
                enter(task, set_by_imports)
                os.close(entered)
                return task
            os.close(entered)
            os.read(ready, 1)  # the answer must not come before the process leads its group, which may be killed next
            os.close(ready)
            running.add(pid)
            answer: int | None = pid
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        answers.write(json.dumps(answer).encode() + b"\n")
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
    return None


def enter(task: Task, set_by_imports: Mapping[str, str]) -> None:
    """Give a process that was just forked what a fresh one has that is through with the same imports."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphan even if the nursery is killed
    for number, path in ((1, task.stdout), (2, task.stderr)):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    os.chdir(task.folder)
    os.environ.clear()
    os.environ.update({**set_by_imports, **task.environment})
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # python's own random does that by itself after a fork
    importlib.invalidate_caches()


def run(task: Task) -> None:
    """Run the task's code as ``__main__``."""
    sys.argv = ["-m" if task.module else task.target, *task.args]
    if not sys.flags.safe_path:
        sys.path[0] = task.folder if task.module else os.path.dirname(os.path.realpath(task.target))
    if task.module:
        runpy.run_module(task.target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(task.target, run_name="__main__")


def end(code: int) -> NoReturn:
    """End this process as python does, but leave its modules as they are.

    To take thousands of them down costs a second of CPU and copies all that is shared with the nursery. Destructors
    that run only then are for the jobs whose processes a launcher starts.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(meeting: str, owner: str, *imports: str) -> None:
    """Import and listen; in a forked nursery say so, and serve; in a process of one run its task."""
    before = dict(os.environ)
    for name in imports:
        module, _, function = name.partition(":")
        imported = importlib.import_module(module)
        if function:
            getattr(imported, function)()
        gc.collect()
        gc.freeze()  # or each child would copy everything to look for cycles in it
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("an import has started a thread, which forked processes would lack")
    line = listen(Path(meeting), int(owner))
    if line is None:
        shutil.rmtree(meeting)
        return
    requests, answers = os.fdopen(os.dup(line.fileno()), "rb"), os.fdopen(line.detach(), "wb", buffering=0)
    answers.write(json.dumps([os.getpid(), dict(os.environ)]).encode() + b"\n")
    task = serve(requests, answers, {name: value for name, value in os.environ.items() if before.get(name) != value})
    if task is None:
        os._exit(0)
    try:
        run(task)
    except SystemExit as exit:
        code = exit.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
        end(code or 0)
    except Exception:
        try:
            sys.excepthook(*sys.exc_info())
        except SystemExit as exit:  # the code that a halt has set
            end(exit.code if isinstance(exit.code, int) else 1)
        end(1)
    # KeyboardInterrupt is python's own, which ends by the signal.
    end(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
