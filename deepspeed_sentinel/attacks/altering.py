"""Attacks that change the honest message by a rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from deepspeed_sentinel.attacks.base import register
from deepspeed_sentinel.attacks.common import check_choice, check_number, flip_bit, normal_like, tokens, uniform_like
from deepspeed_sentinel.attacks.context import AttackContext

_INTEGERS = {"int8": 127, "int4": 7}
_FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@register("scaling")
@dataclass(frozen=True)
class Scaling:
    """The message times ``factor``."""

    factor: float = -1.0

    def __post_init__(self) -> None:
        check_number("factor", self.factor)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return message * self.factor


@register("random_sign")
@dataclass(frozen=True)
class RandomSign:
    """The sign of a share ``rate`` of the elements is flipped."""

    rate: float = 0.5

    def __post_init__(self) -> None:
        check_number("rate", self.rate, 0.0, 1.0)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return torch.where(uniform_like(message, context.generator) < self.rate, -message, message)


@register("bias")
@dataclass(frozen=True)
class Bias:
    """``size`` standard deviations of the message are added to every element."""

    size: float = 1.0

    def __post_init__(self) -> None:
        check_number("size", self.size)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return message + (self.size * message.float().std(correction=0)).to(message.dtype)


@register("invisible_noise")
@dataclass(frozen=True)
class InvisibleNoise:
    """Each token turned in a random direction: same norm, ``cosine`` to the honest token."""

    cosine: float = 0.99

    def __post_init__(self) -> None:
        check_number("cosine", self.cosine, -1.0, 1.0)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        x_TD = tokens(message).float()
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=1, keepdim=True)
        unit_TD = x_TD / norm_T1.clamp_min(torch.finfo(torch.float32).tiny)
        noise_TD = normal_like(x_TD, context.generator)
        noise_TD -= (noise_TD * unit_TD).sum(1, keepdim=True) * unit_TD
        noise_TD /= torch.linalg.vector_norm(noise_TD, dim=1, keepdim=True).clamp_min(1e-12)
        turned_TD = norm_T1 * (self.cosine * unit_TD + math.sqrt(1.0 - self.cosine**2) * noise_TD)
        return turned_TD.reshape(message.shape).to(message.dtype)


@register("token_shuffle")
@dataclass(frozen=True)
class TokenShuffle:
    """The tokens of the message in random order: every marginal statistic stays as it was."""

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        x_TD = tokens(message)
        order_T = torch.randperm(len(x_TD), generator=context.generator).to(message.device)
        return x_TD[order_T].reshape(message.shape)


@register("low_precision")
@dataclass(frozen=True)
class LowPrecision:
    """Each token rounded to ``format``, scaled to its largest element: int8, int4, fp8_e4m3 or fp8_e5m2."""

    format: str = "int8"

    def __post_init__(self) -> None:
        check_choice("format", self.format, (*_INTEGERS, *_FLOATS))

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        x_TD = tokens(message).float()
        levels = _INTEGERS.get(self.format)
        largest = levels if levels else torch.finfo(_FLOATS[self.format]).max
        scale_T1 = (x_TD.abs().amax(1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
        scaled_TD = x_TD / scale_T1
        rounded_TD = scaled_TD.round() if levels else scaled_TD.to(_FLOATS[self.format]).float()
        return (rounded_TD * scale_T1).reshape(message.shape).to(message.dtype)


@register("bit_flip")
@dataclass(frozen=True)
class BitFlip:
    """One random bit of one random element is inverted, as silent hardware corruption does."""

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return flip_bit(message, context.generator)
