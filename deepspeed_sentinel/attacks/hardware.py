"""What failing hardware does to tensors, after reports of silent corruption in large training runs.

Single flipped bits are fewer than half of what was seen (arXiv 2605.04213); most corruptions are short runs of wrong
elements at a regular distance, as a bad lane or a bad column of an array leaves them, and NaN and infinity are about
one in a hundred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from deepspeed_sentinel.attacks.base import register
from deepspeed_sentinel.attacks.common import check_choice, check_count, check_number, flip_bit
from deepspeed_sentinel.attacks.context import AttackContext

_KINDS = ("sign", "zero", "infinity")


@register("periodic_corruption")
@dataclass(frozen=True)
class PeriodicCorruption:
    """A share ``rate`` of the elements is wrong: runs of ``run`` neighbours, ``period`` elements apart.

    ``kind`` says what becomes of them: sign (inverted), zero or infinity. The rate is that of the long run, exactly:
    a message of n elements gets k runs, k = rate n / run rounded up or down by chance so that its mean is right. With
    fewer than one run a message that is a run now and then.

    Example:
        524,288 elements, rate 1e-6, run 4: 0.131 runs, so about every eighth message has four wrong elements and the
        others none. At rate 1e-5 it is 1.31 runs: one or two in every message.
    """

    kind: str = "sign"
    rate: float = 1e-6
    run: int = 4
    period: int = 64

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, _KINDS)
        check_number("rate", self.rate, 0.0, 1.0)
        check_count("run", self.run)
        check_count("period", self.period, self.run)

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        elements = message.numel()
        run = min(self.run, elements)
        wanted = self.rate * elements / run
        runs = int(wanted + float(torch.rand((), generator=context.generator, dtype=torch.float64)))
        runs = min(runs, elements // run)
        if runs == 0:
            return message
        start = int(torch.randint(elements, (), generator=context.generator))
        # No two runs may overlap, or fewer elements would be wrong than the rate says.
        period = min(self.period, elements // runs)
        first = start + period * torch.arange(runs)
        where = ((first[:, None] + torch.arange(run)) % elements).flatten().to(message.device)
        flat = message.reshape(-1).clone()
        flat[where] = self._wrong(flat[where])
        return flat.view(message.shape)

    def _wrong(self, values: torch.Tensor) -> torch.Tensor:
        if self.kind == "sign":
            return -values
        return torch.full_like(values, 0.0 if self.kind == "zero" else math.inf)


@register("stored_bit_flip")
@dataclass(frozen=True)
class StoredBitFlip:
    """One random bit of the activation that a stage keeps for its backward pass is inverted. Only in the simulator.

    The activation that leaves is right, and the gradient that leaves is computed from something else. What happens to
    the gradient of the stage's own weights, which crosses no link, is not imitated.
    """

    alters_stored: ClassVar[bool] = True

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        if context.stored is None:
            return message
        kept, altered = context.stored, flip_bit(context.stored, context.generator)
        right, wrong = context.backward_from(kept), context.backward_from(altered)
        # Both are computed alone and the message in a batch, which may differ in the last bit.
        return torch.where(wrong == right, message, message + (wrong - right))
