"""An optimizer's parameter groups: the same ones on every stage, whatever each has to train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Joined(torch.autograd.Function):
    """``Joined.apply(hidden, placeholder)`` is ``hidden``, and gives the placeholder a gradient of zero.

    So what a stage sends requires a gradient even if it trains nothing, since DeepSpeed runs backward from it. The
    gradient is no product with zero: what is not finite must not get from a message into the placeholder.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, placeholder: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(placeholder)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (placeholder,) = ctx.saved_tensors
        return gradients[0], torch.zeros_like(placeholder)


def align_groups(groups: list[dict[str, Any]], placeholder: Callable[[int], nn.Parameter]) -> None:
    """Drop the groups that are empty on all stages, and fill those that are empty here. In place; collective.

    A stage may be frozen, or have no parameter without weight decay. DeepSpeed drops empty groups, but its ZeRO
    optimizer sums gradient norms over stages group by group, and would wait for ever for a stage that has fewer.

    Args:
        groups: of an optimizer that no scheduler has counted yet.
        placeholder: makes the parameter that fills group i.

    Raises:
        ValueError: stages have different numbers of groups.
    """
    everyone: list[list[bool]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, [bool(group["params"]) for group in groups])
    counts = sorted({len(filled) for filled in everyone})
    if len(counts) > 1:
        raise ValueError(
            f"the optimizer has {' or '.join(map(str, counts))} parameter groups, depending on the stage; every stage "
            "needs as many. Let create_optimizer make all groups on each stage, empty ones too."
        )
    for index, group in enumerate(groups):
        if not group["params"]:
            group["params"] = [placeholder(index)] if any(filled[index] for filled in everyone) else []
    groups[:] = [group for group in groups if group["params"]]
