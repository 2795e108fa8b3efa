"""Replicas of a stage draw the same random numbers for the length of a step, and go on from their own."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

from deepspeed_sentinel.engine.randomness import RandomState, StepRandomness
from deepspeed_sentinel.evidence.keys import Secret


@contextmanager
def seeded(seed):
    """One worker's generators, each with a seed of its own, put back afterwards."""
    before, tracker = RandomState.now(), get_cuda_rng_tracker()
    torch.manual_seed(seed)
    random.seed(seed + 1)
    np.random.seed(seed + 2)  # noqa: NPY002
    tracker.reset()
    tracker.add("of_models", seed + 3)
    try:
        yield
    finally:
        before.put_back()


def drawn():
    with get_cuda_rng_tracker().fork("of_models"):
        tracked = torch.rand(3).tolist()
    return (*torch.rand(3).tolist(), random.random(), np.random.rand(), *tracked)  # noqa: NPY002


def worker(seed, same, secret=bytes(32), step=7, early=0):
    """What a worker draws before, in, and after a step."""
    with seeded(seed):
        randomness = StepRandomness(Secret(secret))
        torch.rand(early)
        before = drawn()
        randomness.begin_step(step, same)
        within = drawn()
        randomness.end_step()
        return before, within, drawn()


def test_replicas_with_seeds_of_their_own_draw_the_same_within_the_step():
    one, other = worker(1, same=True), worker(50, same=True)
    assert one[1] == other[1] and one[0] != other[0] and one[2] != other[2]


def test_one_that_drew_more_before_draws_the_same():
    assert worker(1, same=True)[1] == worker(1, same=True, early=5)[1]


@pytest.mark.parametrize("changed", [{"step": 8}, {"secret": b"1" * 32}])
def test_steps_and_stages_draw_others(changed):
    assert not set(worker(1, same=True)[1]) & set(worker(1, same=True, **changed)[1])


def test_afterwards_generators_go_on_from_where_they_were():
    before, _, after = worker(3, same=True)
    with seeded(3):
        assert (drawn(), drawn()) == (before, after)


def test_in_another_step_nothing_is_touched():
    with seeded(3):
        assert worker(3, same=False) == (drawn(), drawn(), drawn())


def test_what_a_model_adds_within_a_step_stays():
    with seeded(3):
        randomness = StepRandomness(Secret(bytes(32)))
        randomness.begin_step(7, same=True)
        get_cuda_rng_tracker().add("late", 90)
        randomness.end_step()
        with get_cuda_rng_tracker().fork("late"):
            torch.rand(1)
