"""How much memory a stranger's message may take: what it announces is looked at first."""

import numpy as np
import pytest
import torch

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence import control as module
from deepspeed_sentinel.evidence.control import Control

RANKS = np.arange(6).reshape(3, 2)


@pytest.fixture
def control(monkeypatch):
    """Of rank 3 = worker (1, 1); ``announced`` is what others say that they will send, in bytes."""
    control = Control.__new__(Control)
    control._ranks, control._stage, control._replica = RANKS, 1, 1
    control._row = control._column = object()
    control.announced, control.taken = [], 0

    def broadcast(tensor, source, group):
        if tensor.dtype == torch.int64:
            tensor.fill_(control.announced[0])
        else:
            control.taken += tensor.numel()

    monkeypatch.setattr(module.dist, "broadcast", broadcast)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 3)
    return control


@pytest.mark.parametrize("size", [101, 1 << 50, -1, -(1 << 62)])
def test_who_announces_more_than_is_taken_is_named_before_memory_is(control, size):
    control.announced = [size]
    with pytest.raises(SentinelError, match=rf"worker \(stage 1, replica 0\) announces {size} bytes.* 0 to 100"):
        control.of_replica(torch.zeros(0, dtype=torch.uint8), 0, most=100)
    with pytest.raises(SentinelError, match=rf"worker \(stage 0, replica 1\) announces {size} bytes.* 0 to 100"):
        control.of_first_stage(torch.zeros(0, dtype=torch.uint8), most=100)
    assert not control.taken


def test_what_is_taken_has_the_size_announced(control):
    control.announced = [100]
    assert control.of_replica(torch.zeros(0, dtype=torch.uint8), 0, most=100).numel() == 100 == control.taken


@pytest.mark.parametrize("size", [-5, 1 << 40])
def test_a_text_of_rank_0_is_no_longer_than_a_text(control, size, monkeypatch):
    monkeypatch.setattr(control, "all_gather", lambda mine: torch.tensor([[size]] * 6))
    with pytest.raises(SentinelError, match=rf"worker \(stage 0, replica 0\) announces {size} bytes"):
        control.of_first("")
