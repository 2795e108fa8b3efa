"""Placeholders of stages that train nothing."""

from __future__ import annotations

import torch
from torch import nn

from deepspeed_sentinel.hf.groups import Joined


def test_a_placeholder_changes_nothing_and_its_gradient_is_zero_whatever_comes_back():
    placeholder = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    hidden = torch.tensor([-0.0, float("inf"), 1.0])
    joined = Joined.apply(hidden, placeholder)
    assert joined.requires_grad and torch.equal(joined.view(torch.int32), hidden.view(torch.int32))
    joined.backward(torch.tensor([float("nan"), float("inf"), 1.0]))
    assert placeholder.grad.item() == 0.0 and placeholder.grad.dtype == torch.bfloat16


def test_a_hidden_state_that_needs_a_gradient_gets_it():
    placeholder, hidden = nn.Parameter(torch.zeros(1)), torch.ones(3, requires_grad=True)
    Joined.apply(hidden, placeholder).backward(torch.arange(3.0))
    assert torch.equal(hidden.grad, torch.arange(3.0))
