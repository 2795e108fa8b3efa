"""With which code a script ends that a halt stops."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from deepspeed_sentinel.engine.ending import HALTED_EXIT_CODE, ends_with
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
    ],
    ids=["halted", "another error", "a script that decides itself", "nothing"],
)
def test_the_exit_code_says_that_it_was_halted(end, code, said):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "exit handlers ran" in done.stdout
