"""Runs the other tests of this folder once more with the kernels in Triton's interpreter in the references' place."""

import subprocess

import pytest

from deepspeed_sentinel.kernels.dispatch import INTERPRETED, tl


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's run")
@pytest.mark.skipif(tl is None, reason="no triton for this platform")
def test_kernels_in_the_interpreter(interpreter_run: subprocess.Popen[str]) -> None:
    output, _ = interpreter_run.communicate()
    assert interpreter_run.returncode == 0, output[-8000:]
