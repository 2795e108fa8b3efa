"""What a rehearsal leaves behind in the process that ran it: nothing."""

import random
from types import SimpleNamespace

import numpy as np
import torch

from deepspeed_sentinel.engine.replay import Replay
from deepspeed_sentinel.evidence.probe import ENDS
from deepspeed_sentinel.mesh import Mesh


def test_random_numbers_of_all_three_kinds_are_the_same_the_second_time():
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
    replay = Replay(engine, Mesh(3, 2), np.arange(6).reshape(3, 2), None, probe, every=1, seed=0)
    drawn = []

    def run():
        drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))  # noqa: NPY002

    replay.rehearse(run, lambda: None)
    run()
    assert drawn[0] == drawn[1]
