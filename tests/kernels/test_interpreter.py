"""Runs the other tests of this folder once more with the kernels in Triton's interpreter in the references' place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed_sentinel.kernels.dispatch import INTERPRETED, tl
from integration_tests.variants import some

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's run")
@pytest.mark.skipif(tl is None, reason="no triton for this platform")
@pytest.mark.parametrize("chosen", some(("not long", "long"), ("not long",)))
def test_kernels_in_the_interpreter(chosen: str) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"),
            *("-m", chosen, "--deselect", f"{HERE}/test_compilation.py", str(HERE)),
        ],
        cwd=HERE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:]
