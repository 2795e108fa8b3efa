"""The same tests run three ways: the references on a CPU, the kernels in Triton's interpreter (test_interpreter.py
starts that, in a process of its own, since Triton decides when it is imported), and the kernels on a GPU."""

import dataclasses
import inspect
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from deepspeed_sentinel.kernels import sliced_wasserstein, token_sketch
from deepspeed_sentinel.kernels.dispatch import INTERPRETED, tl

# What a formula is good for is shown on its reference, and kernels are held against references.
OF_FORMULAS = {
    "test_cosine_is_known_equally_well_however_little_a_stage_changes",
    "test_digests_of_two_keys_have_nothing_in_common",
    "test_what_changes_nothing_but_highest_bits_shows_under_every_key",
    "test_inner_products_are_unbiased_with_the_variance_of_independent_signs_or_less",
    "test_reference_takes_no_decision_from_data_off_the_cpu",
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


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """The interpreter without most of its work, from which nothing follows.

    For each function that a kernel calls it looks through all of triton.language for what it has not put its own in
    the place of yet; it computes which sums of integers overflow, which is told under ``debug`` alone; and in a sort
    it takes exclusive ors element by element, where numpy has the operation.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    places = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    names = {
        place: [name for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)] for place in places
    }

    def members(place: object) -> list[tuple[str, object]]:
        if place not in names:
            return inspect.getmembers(place)
        found = [(name, getattr(place, name)) for name in names[place]]
        replaced = bool(found) and not tl.core.is_builtin(found[0][1])  # all of a place are or none
        return [] if replaced else found

    def reduced(self, given):
        if self.combine_fn is not tl.standard._xor_combine:
            return reduce_all(self, given)
        values = np.bitwise_xor.reduce(given[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(values, given[0].dtype)

    reduce_all = interpreter.ReduceOps.apply_impl
    seen_inspect = types.ModuleType("inspect")
    seen_inspect.__dict__.update({**vars(inspect), "getmembers": members})
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "inspect", seen_inspect)
        patch.setattr(interpreter.ReduceOps, "apply_impl", reduced)
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


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
