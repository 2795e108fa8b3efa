"""Forked processes begin, run and end as those that python starts itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from integration_tests.harness import ROOT, base_environment
from integration_tests.nursery import Nursery, NurseryError, Task


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery(base_environment(), ["numpy"], ROOT)
    yield nursery
    nursery.close()


def task(folder: Path, code: str, *args: str, module: bool = False, **environment: str) -> Task:
    """The code as a script (or module) code.py in the folder, with empty logs."""
    script = folder / "code.py"
    script.write_text(code)
    for name in ("out", "err"):
        (folder / name).write_text("")
    return Task(
        target="code" if module else str(script),
        module=module,
        args=args,
        environment={**base_environment(), **environment},
        folder=str(folder),
        stdout=str(folder / "out"),
        stderr=str(folder / "err"),
    )


def fresh(what: Task) -> int:
    """Run a task in a process that python starts, as the measure for forked ones."""
    command = [sys.executable, "-u", *(["-m"] if what.module else []), what.target, *what.args]
    with Path(what.stdout).open("wb") as out, Path(what.stderr).open("wb") as err:
        return subprocess.run(
            command,
            env=what.environment,
            cwd=what.folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        ).returncode


LOOK = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "environment": dict(os.environ),
    "folder": os.getcwd(),
    "main": [__name__, sys.modules["__main__"].__dict__ is globals(), os.path.basename(__file__)],
    "leads": os.getpid() == os.getsid(0) == os.getpgrp(),
    "stdin": sys.stdin.read(),
    "files": sorted(os.listdir("/proc/self/fd"))[:-1],
    "unbuffered": sys.stdout.write_through,
}))
"""


@pytest.mark.parametrize("module", [False, True], ids=["script", "module"])
def test_a_process_sees_what_a_fresh_one_sees(nursery, tmp_path, module):
    what = task(tmp_path, LOOK, "a", "b c", module=module, RANK="3", OTHER="ü")
    seen = []
    for start in (fresh, lambda what: nursery.start(what).wait(30)):
        assert start(what) == 0, (tmp_path / "err").read_text()
        seen.append(json.loads((tmp_path / "out").read_text()))
    assert seen[0] == seen[1]
    assert seen[1]["argv"][1:] == ["a", "b c"] and seen[1]["environment"]["OTHER"] == "ü"


THREAD = "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('joined'))).start()\n"
ENDS = {
    "done": ("print('last')", 0, "last", ""),
    "exit code": ("raise SystemExit(7)", 7, "", ""),
    "exit text": ("import sys; sys.exit('why')", 1, "", "why\n"),
    "error": (
        "def broken():\n    raise ValueError('why')\nbroken()",
        1,
        "",
        "in broken\n    raise ValueError('why')\n",
    ),
    "syntax": ("1 +", 1, "", "SyntaxError: invalid syntax"),
    "killed": ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, "", ""),
    "interrupted": ("import os; os.kill(os.getpid(), 2)", -signal.SIGINT, "", "KeyboardInterrupt"),
    "hard": ("import os; print('said'); os._exit(4)", 4, "said", ""),
    "atexit": ("import atexit; atexit.register(print, 'bye'); raise SystemExit(2)", 2, "bye", ""),
    "atexit after an error": ("import atexit; atexit.register(print, 'bye'); 1 / 0", 1, "bye", "ZeroDivisionError"),
    "thread at the end": (THREAD, 0, "joined", ""),
    "thread": (THREAD + "raise SystemExit(3)", 3, "joined", ""),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_process_ends_as_a_fresh_one_ends(nursery, tmp_path, name):
    code, returncode, out, err = ENDS[name]
    what = task(tmp_path, code)
    for start in (fresh, lambda what: nursery.start(what).wait(30)):
        assert start(what) == returncode, (tmp_path / "err").read_text()
        assert out in (tmp_path / "out").read_text()
        assert err in (tmp_path / "err").read_text()


def test_waiting_has_a_limit_and_a_kill_ends_the_group(nursery, tmp_path):
    child = nursery.start(task(tmp_path, "import time; time.sleep(60)"))
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait(30) == child.poll() == child.returncode == -signal.SIGKILL


def test_random_numbers_differ_between_processes(nursery, tmp_path):
    what = task(tmp_path, "import random, numpy; print(random.random(), numpy.random.random())")
    drawn = set()
    for _ in range(2):
        assert nursery.start(what).wait(30) == 0
        drawn |= set((tmp_path / "out").read_text().split())
        (tmp_path / "out").write_text("")  # the next output may be shorter
    assert len(drawn) == 4


def test_only_a_jobs_own_variables_may_differ(nursery):
    same = base_environment()
    assert nursery.fits({**same, "RANK": "1", "JOB_FOLDER": "here"})
    assert not nursery.fits({**same, "DS_ACCELERATOR": "cuda"})
    assert not nursery.fits({**same, "TORCH_LOGS": "+dynamo"})
    assert not nursery.fits({name: value for name, value in same.items() if name != "OMP_NUM_THREADS"})


def test_a_variable_that_an_import_sets_stays_set(tmp_path):
    (tmp_path / "sets.py").write_text("import os; os.environ.setdefault('SET', 'by import')")
    environment = {**base_environment(), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    nursery = Nursery(environment, ["sets"], ROOT)
    assert nursery.fits(environment) and nursery.fits({**environment, "SET": "by import"})
    assert not nursery.fits({**environment, "SET": "else"})
    assert nursery.start(task(tmp_path, "import os; print(os.environ['SET'])")).wait(30) == 0
    assert (tmp_path / "out").read_text() == "by import\n"
    nursery.close()


@pytest.mark.parametrize(
    ("module", "said"),
    [("not_there", "No module named 'not_there'"), ("starts", "an import has started a thread")],
)
def test_what_keeps_the_nursery_from_starting_is_said(tmp_path, module, said):
    (tmp_path / "starts.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()"
    )
    with pytest.raises(NurseryError, match=rf"exit code 1:(.|\n)*{said}"):
        Nursery({**base_environment(), "PYTHONPATH": f"{ROOT}:{tmp_path}"}, [module], ROOT)


PYTEST = """
import json, sys, time
from integration_tests.nursery import Nursery, Task
fields = json.loads(sys.argv[1])
nursery = Nursery(fields["environment"], [], sys.argv[2])
print(nursery.pid, nursery.start(Task(**fields)).pid, flush=True)
time.sleep(60)
"""


def lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def ended(*processes: psutil.Process) -> None:
    deadline = time.monotonic() + 20
    for process in processes:
        while lives(process):
            assert time.monotonic() < deadline, f"{process} lives on"
            time.sleep(0.02)


@pytest.mark.parametrize("killed", ["pytest", "nursery"])
def test_nothing_outlives_its_parent(tmp_path, killed):
    what = task(tmp_path, "import time; time.sleep(60)")
    fields = json.dumps(vars(what))
    command = [sys.executable, "-c", PYTEST, fields, str(ROOT)]
    with subprocess.Popen(command, env=base_environment(), stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        nursery, child = (psutil.Process(int(pid)) for pid in starter.stdout.readline().split())
        mother = nursery.parent()
        (starter if killed == "pytest" else nursery).kill()
        ended(nursery, child)
        assert killed == "pytest" or lives(mother), "others may be with her"
        starter.kill()
        ended(mother)


COUNTED = "import os; os.write(os.open(os.environ['COUNT'], os.O_WRONLY | os.O_APPEND), b'imported ')"


def test_processes_share_a_mother_and_end_what_they_started_alone(tmp_path):
    (tmp_path / "counted.py").write_text(COUNTED)
    (count := tmp_path / "count").write_text("")
    environment = {**base_environment(), "PYTHONPATH": f"{ROOT}:{tmp_path}", "COUNT": str(count)}
    first, second = (
        Nursery({**environment, "PYTEST_XDIST_WORKER": name}, ["counted"], ROOT, meeting=tmp_path / "meeting")
        for name in ("gw0", "gw1")
    )
    assert count.read_text() == "imported "
    assert psutil.Process(first.pid).parent() == psutil.Process(second.pid).parent()
    assert second.fits({**environment, "PYTEST_XDIST_WORKER": "gw1"})
    waits = task(tmp_path, "import time; time.sleep(60)")
    theirs, ours = psutil.Process(first.start(waits).pid), second.start(waits)
    first.close()
    ended(theirs)
    assert ours.poll() is None and second.start(task(tmp_path, "print('on')")).wait(30) == 0
    with pytest.raises(NurseryError, match="has ended"):
        first.start(waits)
    second.close()
