"""The same tests run three ways: the references on a CPU, the kernels in Triton's interpreter (test_interpreter.py
starts that, in a process of its own, since Triton decides when it is imported), and the kernels on a GPU."""

import pytest
import torch

from deepspeed_sentinel.kernels import sliced_wasserstein, token_sketch
from deepspeed_sentinel.kernels.dispatch import INTERPRETED

# What a formula is good for is shown on its reference, and kernels are held against references.
OF_FORMULAS = {
    "test_cosine_is_known_equally_well_however_little_a_stage_changes",
    "test_digests_of_two_keys_have_nothing_in_common",
    "test_what_changes_nothing_but_highest_bits_shows_under_every_key",
    "test_nothing_waits_for_the_device_in_the_message_path",
    "test_kernels_are_imported_and_not_used",
}


@pytest.hookimpl(tryfirst=True)  # before pytest goes by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter takes milliseconds an operation: of the two 16-bit types `make test` has one there."""
    for item in items if INTERPRETED else ():
        of_half = hasattr(item, "callspec") and torch.float16 in item.callspec.params.values()
        if of_half or getattr(item, "originalname", item.name) in OF_FORMULAS:
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
