"""The same tests run three ways: the references on a CPU, the kernels in Triton's interpreter (test_interpreter.py
starts that, in a process of its own, since Triton decides when it is imported), and the kernels on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepspeed_sentinel.kernels import sliced_wasserstein, token_sketch
from deepspeed_sentinel.kernels.dispatch import INTERPRETED

HERE = Path(__file__).resolve().parent
IN_THE_INTERPRETER = "test_kernels_in_the_interpreter"
RUN = pytest.StashKey[subprocess.Popen[str]]()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.hookimpl(trylast=True)  # when others have deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter's run is waited for once all other unit tests are through, which take one core."""
    for item in [item for item in items if item.name == IN_THE_INTERPRETER]:
        items.remove(item)
        unit_tests = [index for index, other in enumerate(items) if other.path.is_relative_to(HERE.parent)]
        items.insert(max(unit_tests, default=-1) + 1, item)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the interpreter's run, where it is asked for, beside all unit tests."""
    asked_for = any(item.name == IN_THE_INTERPRETER for item in session.items)
    if INTERPRETED or session.config.option.collectonly or not asked_for:
        return
    session.config.stash[RUN] = subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"),
            *("--deselect", f"{HERE}/test_compilation.py", str(HERE)),
        ],
        cwd=HERE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    if RUN in config.stash:
        with config.stash[RUN] as run:
            run.kill()


@pytest.fixture
def interpreter_run(request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    """The interpreter's run, begun with the first of all tests."""
    return request.config.stash[RUN]


@pytest.fixture
def coarse_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few large programs where the interpreter would run hundreds of small ones."""
    if INTERPRETED:
        monkeypatch.setitem(token_sketch.SHAPE, "BM", 64)
        monkeypatch.setitem(sliced_wasserstein.SHAPE, "P", sliced_wasserstein.DIRECTIONS)
        monkeypatch.setitem(sliced_wasserstein.SHAPE, "BM", 64)
