"""The same tests run three ways: the references on a CPU, the kernels in Triton's interpreter (test_interpreter.py
starts that, in a process of its own, since Triton decides when it is imported), and the kernels on a GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deepspeed_sentinel.kernels import sliced_wasserstein, token_sketch
from deepspeed_sentinel.kernels.dispatch import INTERPRETED


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def interpreter_run(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str] | None]:
    """The interpreter's run, where it is asked for: from the first test of this folder on, beside the others."""
    if INTERPRETED or not any(item.name == "test_kernels_in_the_interpreter" for item in request.session.items):
        yield None
        return
    here = Path(__file__).resolve().parent
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"),
            *("--deselect", f"{here}/test_compilation.py", str(here)),
        ],
        cwd=here.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        yield run
        run.kill()


@pytest.fixture
def coarse_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few large programs where the interpreter would run hundreds of small ones."""
    if INTERPRETED:
        monkeypatch.setitem(token_sketch.SHAPE, "BM", 64)
        monkeypatch.setitem(sliced_wasserstein.SHAPE, "P", sliced_wasserstein.DIRECTIONS)
        monkeypatch.setitem(sliced_wasserstein.SHAPE, "BM", 64)
