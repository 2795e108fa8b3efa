"""An attack on whatever tensor it is told to act on, integers too: see "tensor" in the "inject" block."""

from __future__ import annotations

import torch

from deepspeed_sentinel.attacks.context import AttackContext


class Roll:
    """The elements moved on by one place in each row."""

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return message.roll(1, -1)
