"""The same tests run three ways: the references on a CPU, the kernels in Triton's interpreter (test_interpreter.py
starts that, in a process of its own, since Triton decides when it is imported), and the kernels on a GPU."""

import pytest
import torch

from deepspeed_sentinel.kernels import sliced_wasserstein, token_sketch
from deepspeed_sentinel.kernels.dispatch import INTERPRETED


@pytest.hookimpl(tryfirst=True)  # before pytest goes by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter takes milliseconds an operation: of the two 16-bit types `make test` has one there."""
    for item in items:
        if INTERPRETED and hasattr(item, "callspec") and torch.float16 in item.callspec.params.values():
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def coarse_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few large programs where the interpreter would run hundreds of small ones."""
    if INTERPRETED:
        monkeypatch.setitem(token_sketch.SHAPE, "BM", 64)
        monkeypatch.setitem(sliced_wasserstein.SHAPE, "P", sliced_wasserstein.DIRECTIONS)
        monkeypatch.setitem(sliced_wasserstein.SHAPE, "BM", 64)
