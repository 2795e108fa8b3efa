"""With which code a script ends that a halt stops."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from deepspeed_sentinel.ending import HALTED_EXIT_CODE, ends_with
from deepspeed_sentinel.errors import LostWorker, SentinelHalt
atexit.register(lambda: print("exit handlers ran"))
ends_with(HALTED_EXIT_CODE)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ('raise SentinelHalt("why")', 75, "SentinelHalt: why"),
        ('raise LostWorker("who")', 1, "LostWorker: who"),
        ('try:\n    raise SentinelHalt("why")\nexcept SentinelHalt:\n    sys.exit(3)', 3, ""),
        ("", 0, ""),
        ('sys.excepthook = lambda *_: 1 / 0\nends_with(75)\nraise SentinelHalt("why")', 75, "SentinelHalt: why"),
    ],
    ids=["halted", "another error", "a script that decides itself", "nothing", "another hook that fails"],
)
def test_the_exit_code_says_that_it_was_halted(end, code, said):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "exit handlers ran" in done.stdout


REFUSES = """
import sys
from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.ending import refused_once
with refused_once({rank}):
    SentinelConfig.parse({{"acton": 1}})
"""


@pytest.mark.parametrize("rank", [0, 3])
def test_what_every_rank_refuses_has_one_traceback(rank):
    done = subprocess.run(
        [sys.executable, "-c", REFUSES.format(rank=rank)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and ("Traceback" in done.stderr) == (rank == 0)
    assert 'sentinel.acton: unknown key (value 1); did you mean "action"?' in done.stderr
    if rank:
        (line,) = done.stderr.splitlines()
        assert line.startswith('[sentinel] rank 3: Invalid "sentinel" block')


def test_another_error_than_what_was_refused_has_its_traceback():
    script = REFUSES.format(rank=3).replace("with", "try:\n  with", 1).replace("    Sent", "      Sent")
    done = subprocess.run(
        [sys.executable, "-c", f"{script}except ValueError:\n  raise KeyError('mine')"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'mine'" in done.stderr


@pytest.mark.parametrize("broken", ["stdout", "stderr"])
def test_a_full_disk_behind_the_log_does_not_change_the_code(broken):
    """Python itself ends with 120 where it cannot write out what was printed."""
    script = SCRIPT.format(end='print("so far")\nraise SentinelHalt("why")')
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, broken: full}
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run([sys.executable, "-c", script], **streams, env=buffered, text=True, check=False)
    assert done.returncode == 75, done
