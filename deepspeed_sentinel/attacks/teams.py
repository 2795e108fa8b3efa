"""Attacks of workers that conspire, and attacks on the reputation of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from deepspeed_sentinel.attacks.base import register
from deepspeed_sentinel.attacks.common import check_number
from deepspeed_sentinel.attacks.composite import Composite, build_inner
from deepspeed_sentinel.attacks.context import AttackContext, seeded


@register("collusion")
class Collusion(Composite):
    """A share ``share`` of the attackers do ``inner`` in the same steps and with the same random draws.

    In each step they act with probability ``chance``, all or none of them. The other attackers do ``inner`` each for
    itself. Where receivers report (``--verifier receiver``), a colluder reports another's message as honest.
    """

    vouches: ClassVar[bool] = True

    def __init__(
        self,
        inner: str = "bias",
        inner_arguments: Mapping[str, Any] | None = None,
        share: float = 1.0,
        chance: float = 1.0,
    ) -> None:
        check_number("share", share, 0.0, 1.0)
        check_number("chance", chance, 0.0, 1.0)
        super().__init__(build_inner(inner, inner_arguments))
        self.share, self.chance = share, chance

    def takes_part(self, context: AttackContext) -> bool:
        """Whether this worker is one of the conspirators."""
        generator = seeded(context.seed, "collusion", context.stage, context.replica)
        return float(torch.rand((), generator=generator)) < self.share

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        if not self.takes_part(context):
            return self.inner[0](message, context)
        if float(torch.rand((), generator=context.shared_generator("acts"))) >= self.chance:
            return message
        shared = context.shared_generator("message", context.micro_batch)
        return self.inner[0](message, context.with_generator(shared))


@register("framing")
class Framing(Composite):
    """A receiver reports about its sender's message as if ``inner`` had been done to it; the message stays honest."""

    false_report: ClassVar[bool] = True

    def __init__(self, inner: str = "scaling", inner_arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__(build_inner(inner, inner_arguments))

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return self.inner[0](message, context)
