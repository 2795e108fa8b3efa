"""Weights of earlier steps, for attackers that compute honestly with stale ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.func import functional_call

from deepspeed_sentinel.mesh import FORWARD


class WeightHistory:
    """The middle stages' weights of the last ``steps`` steps; nothing is kept for 0.

    Attributes:
        past: of each step, the latest last, of each middle stage the weights by name.
    """

    def __init__(self, stages: Sequence[nn.Module], steps: int) -> None:
        self._stages = stages
        self.past: deque[list[dict[str, torch.Tensor]]] = deque(maxlen=steps)

    @torch.no_grad()
    def put(self) -> None:
        """Keep the weights of the step that now ends; call before the optimizer changes them."""
        if self.past.maxlen:
            middle = self._stages[1:-1]
            self.past.append([{name: w.detach().clone() for name, w in s.named_parameters()} for s in middle])

    def recompute(
        self, direction: int, stage: int, entered_BTD: torch.Tensor, gradient_BTD: torch.Tensor | None, k: int
    ) -> torch.Tensor | None:
        """What ``stage`` would send with the weights of ``k`` steps ago; None before there are any.

        Args:
            direction: of the message.
            stage: a middle stage.
            entered_BTD: the activation that entered.
            gradient_BTD: the gradient that entered, for a backward message.
            k: steps ago; 1 is the step before.
        """
        if k > len(self.past):
            return None
        old = self.past[-k][stage - 1]
        if direction == FORWARD:
            with torch.no_grad():
                return functional_call(self._stages[stage], old, (entered_BTD,))
        return backward_from(lambda leaf: functional_call(self._stages[stage], old, (leaf,)), entered_BTD, gradient_BTD)


def backward_from(
    stage: Callable[[torch.Tensor], torch.Tensor], stored_BTD: torch.Tensor, gradient_BTD: torch.Tensor | None
) -> torch.Tensor:
    """The gradient that ``stage`` sends if ``stored_BTD`` is what it kept of the activation that entered it.

    Everything between is computed anew from it, as with activation checkpointing.
    """
    with torch.enable_grad():
        leaf = stored_BTD.detach().requires_grad_()
        left = stage(leaf)
    return torch.autograd.grad(left, leaf, gradient_BTD)[0]
