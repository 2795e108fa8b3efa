"""The built-in attacks, one small class each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from deepspeed_sentinel.attacks.base import AttackContext, register


def _number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")


def _uniform(message: torch.Tensor, context: AttackContext) -> torch.Tensor:
    return torch.rand(message.shape, generator=context.generator).to(message.device)


def _normal(message: torch.Tensor, context: AttackContext) -> torch.Tensor:
    return torch.randn(message.shape, generator=context.generator).to(message.device)


@register("constant")
@dataclass(frozen=True)
class Constant:
    """Every element is ``value``."""

    value: float = 0.0

    def __post_init__(self) -> None:
        _number("value", self.value)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return torch.full_like(message, self.value)


@register("random_value")
@dataclass(frozen=True)
class RandomValue:
    """Every element is drawn from a normal distribution with standard deviation ``std``."""

    std: float = 1.0

    def __post_init__(self) -> None:
        _number("std", self.std, low=0.0)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return (_normal(message, context) * self.std).to(message.dtype)


@register("scaling")
@dataclass(frozen=True)
class Scaling:
    """The message times ``factor``."""

    factor: float = -1.0

    def __post_init__(self) -> None:
        _number("factor", self.factor)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return message * self.factor


@register("random_sign")
@dataclass(frozen=True)
class RandomSign:
    """The sign of a share ``rate`` of the elements is flipped."""

    rate: float = 0.5

    def __post_init__(self) -> None:
        _number("rate", self.rate, 0.0, 1.0)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return torch.where(_uniform(message, context) < self.rate, -message, message)


@register("bias")
@dataclass(frozen=True)
class Bias:
    """``size`` standard deviations of the message are added to every element."""

    size: float = 1.0

    def __post_init__(self) -> None:
        _number("size", self.size)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return message + (self.size * message.float().std(correction=0)).to(message.dtype)


@register("nan")
@dataclass(frozen=True)
class NotANumber:
    """A share ``rate`` of the elements, one at the least, is NaN."""

    rate: float = 1.0

    def __post_init__(self) -> None:
        _number("rate", self.rate, 0.0, 1.0)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        hit = _uniform(message, context) < self.rate
        hit.view(-1)[0] = True
        return message.masked_fill(hit, math.nan)


@register("bit_flip")
@dataclass(frozen=True)
class BitFlip:
    """One random bit of one random element is inverted, as silent hardware corruption does."""

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        tampered = message.clone(memory_format=torch.contiguous_format)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[message.element_size()]
        width = 8 * message.element_size()
        element = int(torch.randint(message.numel(), (), generator=context.generator))
        bit = int(torch.randint(width, (), generator=context.generator))
        mask = 1 << bit if bit < width - 1 else -(1 << bit)
        tampered.view(-1).view(bits)[element] ^= mask
        return tampered
