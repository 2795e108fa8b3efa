"""What an attacker remembers: its own honest messages of earlier steps."""

from __future__ import annotations

from collections import deque

import torch

from deepspeed_sentinel.attacks.base import Needs


class Memory:
    """What one attacker remembers of its own honest messages: no more than its attack declares.

    A step's messages are put in when they pass, and count as history from the next step on.
    """

    def __init__(self, needs: Needs) -> None:
        self._needs = needs
        self._past: dict[int, deque[tuple[int, torch.Tensor]]] = {}
        self._previous: torch.Tensor | None = None

    def put(self, step: int, micro_batch: int, message: torch.Tensor) -> None:
        """Remember one honest message."""
        if self._needs.history_steps:
            kept = self._past.setdefault(micro_batch, deque(maxlen=self._needs.history_steps))
            kept.append((step, message.detach().clone()))
        if self._needs.uses_previous:
            self._previous = message.detach().clone()

    @property
    def previous(self) -> torch.Tensor | None:
        """The honest message that was put in last."""
        return self._previous

    def history(self, step: int, micro_batch: int, k: int) -> torch.Tensor | None:
        """The honest message ``k`` steps before ``step``, or None.

        Raises:
            ValueError: the attack declares less than ``k``.
        """
        if k > self._needs.history_steps:
            raise ValueError(
                f"history({k}) goes further back than history_steps = {self._needs.history_steps}; declare the class "
                f"attribute history_steps = {k}"
            )
        return next((message for then, message in self._past.get(micro_batch, ()) if then == step - k), None)
