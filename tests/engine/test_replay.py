"""What a rehearsal leaves behind in the process that ran it: nothing."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepspeed_sentinel.engine.replay import Replay
from deepspeed_sentinel.evidence.probe import ENDS
from deepspeed_sentinel.mesh import Mesh


@pytest.fixture
def replay():
    module = torch.nn.Linear(2, 2)
    engine = SimpleNamespace(
        _INSTRUCTION_MAP={},
        device="cpu",
        optimizer=None,
        module=module,
        zero_optimization=lambda: False,
        fp16_enabled=lambda: False,
        zero_grad=module.zero_grad,
    )
    probe = SimpleNamespace(ends=ENDS, digests=lambda end: torch.zeros(1), keyed=lambda end: torch.zeros(1))
    return Replay(engine, Mesh(3, 2), np.arange(6).reshape(3, 2), None, probe, every=1, seed=0)


def test_random_numbers_of_all_three_kinds_are_the_same_the_second_time(replay):
    drawn = []

    def run():
        drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))  # noqa: NPY002

    replay.rehearse(run, lambda: None)
    run()
    assert drawn[0] == drawn[1]


def test_who_catches_what_a_rehearsal_raised_draws_what_comes_next(replay):
    torch.manual_seed(3)
    next_one = torch.rand(())
    torch.manual_seed(3)

    def breaks():
        torch.rand(5)
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        replay.rehearse(breaks, lambda: None)
    assert torch.rand(()) == next_one
