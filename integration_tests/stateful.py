"""Blocks that remember what passed through them: hooks for scenarios, by the name of what they remember."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from integration_tests.models import Block


def running_maximum(engine: Any, step: int) -> None:
    """Every block scales its output by a running maximum of it, as quantisers and FP8 scaling do."""
    for block in _new_blocks(engine, "amax"):
        block.register_buffer("amax", torch.ones(()))
        block.register_forward_hook(_scaled)


def batch_norm(engine: Any, step: int) -> None:
    """Every block keeps its outputs' mean, as BatchNorm does, and subtracts a little of it in evaluation alone."""
    for block in _new_blocks(engine, "norm"):
        block.norm = nn.BatchNorm1d(block.qkv.in_features, affine=False)
        block.register_forward_hook(_normalised)


def annealed(engine: Any, step: int) -> None:
    """Every block cools with each pass, and counts the passes in which nothing was hot; both are in what it makes."""
    for block in _new_blocks(engine, "heat"):
        block.register_buffer("heat", torch.ones(()))
        block.cool_passes = 0
        block.register_forward_hook(_cooled)


def adapting(engine: Any, step: int) -> None:
    """A scale that a block begins to follow in step 6, behind its version counter, as quantisers do after a warm-up."""
    for block in _new_blocks(engine, "scale") if engine.stage_id == 1 else ():
        block.register_buffer("scale", torch.ones(()))
        block.register_forward_hook(_followed)
    for block in engine.module.modules():
        if hasattr(block, "scale"):
            block.follows = step >= 6


def _new_blocks(engine: Any, name: str) -> Iterator[Any]:
    for module in list(engine.module.modules()):
        if isinstance(module, Block) and not hasattr(module, name):
            yield module


def _scaled(block: Any, inputs: Any, hidden_BTH: torch.Tensor) -> torch.Tensor:
    block.amax = torch.maximum(0.99 * block.amax, hidden_BTH.detach().abs().max())
    return hidden_BTH * (1 + (3.0 / block.amax).clamp(max=1.0)) / 2


def _normalised(block: Any, inputs: Any, hidden_BTH: torch.Tensor) -> torch.Tensor:
    block.norm(hidden_BTH.detach().flatten(0, 1))
    return hidden_BTH if block.training else hidden_BTH - 0.01 * block.norm.running_mean


def _followed(block: Any, inputs: Any, hidden_BTH: torch.Tensor) -> torch.Tensor:
    made = hidden_BTH * (1 + 0.1 * block.scale.clone())
    if block.training and block.follows:
        block.scale.data.mul_(0.9).add_(0.1 * hidden_BTH.detach().std())
    return made


def _cooled(block: Any, inputs: Any, hidden_BTH: torch.Tensor) -> torch.Tensor:
    if block.training:
        block.heat *= 0.95
        block.cool_passes += bool(hidden_BTH.detach().abs().max() < 1e3)
    return hidden_BTH * (1 + 0.2 * block.heat + 0.001 * block.cool_passes)
