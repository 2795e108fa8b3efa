"""Attacks on twin steps: what no message shows, and ways to keep still while a twin step may be under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from deepspeed_sentinel.attacks.base import register
from deepspeed_sentinel.attacks.common import check_number
from deepspeed_sentinel.attacks.composite import Composite, build_inner
from deepspeed_sentinel.attacks.context import AttackContext


@register("wrong_gradients")
@dataclass(frozen=True)
class WrongGradients:
    """Gradients of the worker's own weights are ``factor`` times too large. Only in the simulator.

    Its messages are right: none is tampered with.
    """

    factor: float = 1.01
    alters_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("factor", self.factor)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return (message.float() * self.factor).to(message.dtype)


@register("cautious")
class Cautious(Composite):
    """The attack ``inner``, but not while anybody is suspected, when a twin step is likely. Only in the simulator."""

    heeds_suspicion: ClassVar[bool] = True

    def __init__(self, inner: str = "scaling", inner_arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__(build_inner(inner, inner_arguments))

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return message if context.suspicion else self.inner[0](message, context)


@register("comparing")
class Comparing(Composite):
    """The attack ``inner``, but not where a friend of its stage was given the very same. Only in the simulator.

    Attackers of one stage compare what enters them, and know a twin step by it.
    """

    compares_inputs: ClassVar[bool] = True

    def __init__(self, inner: str = "scaling", inner_arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__(build_inner(inner, inner_arguments))

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return message if context.given_same else self.inner[0](message, context)
