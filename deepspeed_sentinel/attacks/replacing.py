"""Attacks that put something else in the message's place, without regard to what the stage would have sent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from deepspeed_sentinel.attacks.base import register
from deepspeed_sentinel.attacks.common import check_number, normal_like, tokens, uniform_like
from deepspeed_sentinel.attacks.context import AttackContext


@register("constant")
@dataclass(frozen=True)
class Constant:
    """Every element is ``value``."""

    value: float = 0.0

    def __post_init__(self) -> None:
        check_number("value", self.value)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return torch.full_like(message, self.value)


@register("random_value")
@dataclass(frozen=True)
class RandomValue:
    """Every element is drawn from a normal distribution with standard deviation ``std``."""

    std: float = 1.0

    def __post_init__(self) -> None:
        check_number("std", self.std, low=0.0)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return (normal_like(message, context.generator) * self.std).to(message.dtype)


@register("matched_random")
@dataclass(frozen=True)
class MatchedRandom:
    """Noise with the mean and variance that each dimension of the honest message has."""

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        x_TD = tokens(message).float()
        noise_TD = normal_like(x_TD, context.generator) * x_TD.std(0, correction=0) + x_TD.mean(0)
        return noise_TD.reshape(message.shape).to(message.dtype)


@register("nan")
@dataclass(frozen=True)
class NotANumber:
    """A share ``rate`` of the elements, one at the least, is NaN."""

    rate: float = 1.0

    def __post_init__(self) -> None:
        check_number("rate", self.rate, 0.0, 1.0)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        hit = uniform_like(message, context.generator) < self.rate
        hit.view(-1)[0] = True
        return message.masked_fill(hit, math.nan)
