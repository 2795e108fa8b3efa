"""What an attack is told about the message it tampers with."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch


def seeded(*parts: object) -> torch.Generator:
    """A generator that depends on all ``parts`` and on nothing else."""
    return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, parts)).encode()))


@dataclass(frozen=True)
class AttackContext:
    """Where and when an attack acts, and what else the attacking worker knows.

    Attributes:
        direction: "forward" (the message is an activation) or "backward" (a gradient).
        stage, replica: the attacking worker.
        step: global step.
        micro_batch: index among the messages that this worker sends in this direction in this step.
        generator: seeded by all of the above, so a run repeats exactly.
        start: first step in which the attack may act.
        seed: of the whole run, the same for all attackers.
        entered: what entered the stage in this direction: the activation it received, or the gradient. Only where
            the attack declares ``uses_entered``; None also where nothing enters (first stage forward, last backward).
        previous: this worker's own honest message just before this one, where ``uses_previous`` is declared.
        stored: for a gradient message, the activation that entered the stage forward and was kept for it, where
            ``alters_stored`` is declared; simulator only.
        suspicion: somebody was suspected when the step began, where ``heeds_suspicion`` is declared; simulator only.
        given_same: another attacker of the stage was given the very same, where ``compares_inputs`` is declared;
            simulator only.
        past: source of ``history``; recomputed: source of ``recompute``; redone: source of ``backward_from``.
    """

    direction: str
    stage: int
    replica: int
    step: int
    micro_batch: int
    generator: torch.Generator
    start: int = 0
    seed: int = 0
    entered: torch.Tensor | None = None
    previous: torch.Tensor | None = None
    stored: torch.Tensor | None = None
    suspicion: bool = False
    given_same: bool = False
    past: Callable[[int], torch.Tensor | None] | None = None
    recomputed: Callable[[int], torch.Tensor | None] | None = None
    redone: Callable[[torch.Tensor], torch.Tensor] | None = None

    def history(self, k: int) -> torch.Tensor | None:
        """This worker's own honest message of ``k`` steps ago with the same micro-batch index, or None.

        Raises:
            ValueError: ``k`` is no positive number, or more than the attack's ``history_steps`` declares.
        """
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"history(k) takes a whole number of steps from 1, got {k!r}")
        return None if self.past is None else self.past(k)

    def recompute(self, k: int) -> torch.Tensor | None:
        """The honest message, computed from the same input with the weights of ``k`` steps ago, or None.

        Raises:
            ValueError: outside the simulator, where nobody keeps old weights.
        """
        if self.recomputed is None:
            raise ValueError("recompute(k) needs old weights, which only the simulator keeps: use it there")
        return self.recomputed(k)

    def backward_from(self, stored: torch.Tensor) -> torch.Tensor:
        """The gradient message, computed as if ``stored`` had been kept of the activation that entered the stage.

        Raises:
            ValueError: outside the simulator, where nobody computes a backward pass twice.
        """
        if self.redone is None:
            raise ValueError("backward_from(stored) computes a backward pass again, as only the simulator can")
        return self.redone(stored)

    def shared_generator(self, *parts: object) -> torch.Generator:
        """A generator that all attackers of the run have in common in this step, for each value of ``parts``."""
        return seeded(self.seed, "shared", self.step, self.direction, *parts)

    def with_generator(self, generator: torch.Generator) -> AttackContext:
        """The same context with other random draws."""
        return dataclasses.replace(self, generator=generator)
