"""Attacks that send what was right at another time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deepspeed_sentinel.attacks.base import register
from deepspeed_sentinel.attacks.common import check_count
from deepspeed_sentinel.attacks.context import AttackContext


def _fits(candidate: torch.Tensor | None, message: torch.Tensor) -> torch.Tensor:
    """``candidate`` where there is one of the same shape; a worker without anything old to send stays honest."""
    if candidate is None or candidate.shape != message.shape:
        return message
    return candidate.to(message.dtype)


@register("delay")
@dataclass(frozen=True)
class Delay:
    """The worker's own message of ``steps`` steps ago; honest until it has one that old."""

    steps: int = 10

    def __post_init__(self) -> None:
        check_count("steps", self.steps)

    @property
    def history_steps(self) -> int:
        return self.steps

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return _fits(context.history(self.steps), message)


@register("replay")
@dataclass(frozen=True)
class Replay:
    """The worker's message of the micro-batch before; for the first of a step, the last of the step before."""

    uses_previous: ClassVar[bool] = True

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return _fits(context.previous, message)


@register("stale_weights")
@dataclass(frozen=True)
class StaleWeights:
    """Honest computation with the stage's weights of ``steps`` steps ago. Only in the simulator."""

    steps: int = 10

    def __post_init__(self) -> None:
        check_count("steps", self.steps)

    @property
    def recompute_steps(self) -> int:
        return self.steps

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return _fits(context.recompute(self.steps), message)
