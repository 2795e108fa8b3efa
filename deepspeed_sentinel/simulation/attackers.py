"""The malicious workers of a simulated mesh: what they send, what they report, what they remember."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from deepspeed_sentinel.attacks import AttackContext, Needs, apply_attack, build_attack
from deepspeed_sentinel.attacks.base import show_honest
from deepspeed_sentinel.attacks.context import seeded
from deepspeed_sentinel.attacks.memory import Memory
from deepspeed_sentinel.attacks.teams import Collusion
from deepspeed_sentinel.mesh import BACKWARD, DIRECTIONS, Mesh, Worker
from deepspeed_sentinel.simulation.options import SimulationOptions


class Anew(Protocol):
    """What can be computed anew of a stage's work, for the message at a position (column, micro-batch)."""

    def with_old_weights(self, direction: int, stage: int, at: tuple[int, int], k: int) -> torch.Tensor | None:
        """The honest message with the weights of ``k`` steps ago; None before there are any."""
        ...

    def stored(self, stage: int, at: tuple[int, int]) -> torch.Tensor:
        """The activation that entered the stage."""
        ...

    def backward_from(self, stage: int, at: tuple[int, int], stored_BTD: torch.Tensor) -> torch.Tensor:
        """The gradient that leaves if ``stored_BTD`` was kept of that activation."""
        ...


@dataclass(frozen=True)
class Part:
    """Which messages of a step are being computed.

    Attributes:
        columns, micro_batches: their indices, in the order of the tensors' first two dimensions.
        again: they were computed before in this step, with more columns.
    """

    columns: tuple[int, ...]
    micro_batches: tuple[int, ...]
    again: bool


@dataclass(frozen=True)
class _Message:
    worker: Worker
    index: int  # among the messages that its worker sends in this step
    at: tuple[int, int]  # position in the tensors


class Attackers:
    """All malicious workers of a run and their attack.

    Every draw is seeded by who acts where and when, so attackers act the same again when a step is repeated with
    fewer columns. What they remember of a step counts from ``end_step`` on.

    Attributes:
        malicious: bool [S, R], who may tamper.
        watches: whether it remembers or learns from honest messages, also before it may act.
        acted_first: int [S, R], the first step in which a worker truly changed something; -1 is never.
        altered: (direction, stage, column, micro-batch) of all messages changed in this step.
    """

    def __init__(self, options: SimulationOptions, malicious: np.ndarray) -> None:
        assert options.attack is not None
        self._options = options
        self.malicious = malicious
        self._attack = build_attack(options.attack, options.attack_arguments)
        self.needs = Needs.of(self._attack)
        self._observes = hasattr(self._attack, "observe")
        self.watches = self._observes or self.needs.uses_previous or self.needs.history_steps > 0
        self._memory: dict[tuple[Worker, int], Memory] = {}
        self._honest: dict[tuple[int, Worker, int], torch.Tensor] = {}
        self._seen: list[tuple[torch.Tensor, AttackContext]] = []
        self._suspicion = False
        self.acted_first = np.full(malicious.shape, -1)
        self.altered: set[tuple[int, int, int, int]] = set()

    def acts_in(self, direction: int) -> bool:
        return self._options.direction in (DIRECTIONS[direction], "both")

    def tamper(
        self,
        direction: int,
        stage: int,
        step: int,
        part: Part,
        served: np.ndarray,
        sent_CMBTD: torch.Tensor,
        entered_CMBTD: torch.Tensor | None,
        anew: Anew | None,
    ) -> torch.Tensor:
        """What the workers of ``stage`` really send; the very same tensor if none of them tampers."""
        idle = step < self._options.start and not self.watches
        if idle or not self.acts_in(direction) or self.needs.false_report or self.needs.alters_gradients:
            return sent_CMBTD
        twins = self._given_same(stage, part, served, entered_CMBTD) if self.needs.compares_inputs else set()
        wire = sent_CMBTD
        for message in self._messages(stage, part, served):
            honest = sent_CMBTD[message.at]
            entered = None if entered_CMBTD is None or not self.needs.uses_entered else entered_CMBTD[message.at]
            context = self._context(direction, message, step, entered, anew)
            if message.at in twins:
                context = dataclasses.replace(context, given_same=True)
            if not part.again:
                self._remember(direction, message, honest, context)
            if step < self._options.start:
                continue
            tampered = apply_attack(self._attack, honest, context)
            if torch.equal(tampered, honest):
                continue
            wire = wire.clone() if wire is sent_CMBTD else wire
            wire[message.at] = tampered
            self._note(message.worker, step)
            self.altered.add((direction, stage, part.columns[message.at[0]], part.micro_batches[message.at[1]]))
        return wire

    def false_reports(
        self, direction: int, stage: int, step: int, part: Part, served: np.ndarray, received_CMBTD: torch.Tensor
    ) -> torch.Tensor:
        """What the receivers in ``stage`` claim to have received; the very same tensor if all are truthful."""
        if not (self.needs.false_report and self.acts_in(direction) and step >= self._options.start):
            return received_CMBTD
        claimed = received_CMBTD
        for message in self._messages(stage, part, served):
            true = received_CMBTD[message.at]
            context = self._context(direction, message, step, None, None)
            claimed = claimed.clone() if claimed is received_CMBTD else claimed
            claimed[message.at] = apply_attack(self._attack, true, context)
            if not torch.equal(claimed[message.at], true):
                self._note(message.worker, step)
        return claimed

    def vouched(
        self, sender_stage: int, receiver_stage: int, direction: int, step: int, part: Part, served: np.ndarray
    ) -> torch.Tensor:
        """Messages on which both ends report as if nothing had been done, bool [C, M]."""
        mask = torch.zeros(len(part.columns), len(part.micro_batches), dtype=torch.bool)
        if not (self.needs.vouches and self.acts_in(direction) and step >= self._options.start):
            return mask
        assert isinstance(self._attack, Collusion)
        for position, column in enumerate(part.columns):
            ends = [Worker(stage, int(served[stage, column])) for stage in (sender_stage, receiver_stage)]
            mask[position] = all(self.malicious[end] and self._takes_part(end) for end in ends)
        return mask

    def tamper_gradients(
        self,
        step: int,
        served: np.ndarray,
        gradients: tuple[tuple[torch.Tensor | None, ...], ...],
        stage_of: Sequence[int],
    ) -> tuple[tuple[torch.Tensor | None, ...], ...]:
        """What the workers really accumulate, column by column and weight by weight.

        Args:
            step: global step.
            served: int [S, C].
            gradients: of each column one tensor a weight.
            stage_of: the stage of each weight.
        """
        if step < self._options.start or not self.needs.alters_gradients:
            return gradients
        altered = [list(of_column) for of_column in gradients]
        for column, of_column in enumerate(altered):
            for index, stage in enumerate(stage_of):
                worker, honest = Worker(stage, int(served[stage, column])), of_column[index]
                if not self.malicious[worker] or honest is None:
                    continue
                message = _Message(worker, index, (column, 0))
                tampered = apply_attack(self._attack, honest, self._context(BACKWARD, message, step, None, None))
                if not torch.equal(tampered, honest):
                    of_column[index] = tampered
                    self._note(worker, step)
        return tuple(map(tuple, altered))

    def begin_step(self, suspicion: bool) -> None:
        """Forget which messages of the step before were changed; ``suspicion``: somebody is suspected."""
        self._suspicion = suspicion
        self.altered = set()

    def end_step(self, step: int) -> None:
        """What passed in this step becomes memory."""
        for (direction, worker, index), honest in self._honest.items():
            memory = self._memory.setdefault((worker, direction), Memory(self.needs))
            memory.put(step, index, honest)
        for message, context in self._seen:
            show_honest(self._attack, message, context)
        self._honest, self._seen = {}, []

    def _given_same(
        self, stage: int, part: Part, served: np.ndarray, entered_CMBTD: torch.Tensor | None
    ) -> set[tuple[int, int]]:
        """Positions of messages for which another attacker of the stage was given the very same."""
        if entered_CMBTD is None:
            return set()
        places = [(message.worker, message.at) for message in self._messages(stage, part, served)]
        return {
            at
            for worker, at in places
            for other, there in places
            if other != worker and torch.equal(entered_CMBTD[at], entered_CMBTD[there])
        }

    def _takes_part(self, worker: Worker) -> bool:
        context = AttackContext("", *worker, 0, 0, torch.Generator(), seed=self._options.seed)
        return not isinstance(self._attack, Collusion) or self._attack.takes_part(context)

    def _messages(self, stage: int, part: Part, served: np.ndarray) -> Iterator[_Message]:
        position_of = {column: position for position, column in enumerate(part.columns)}
        for column, replica in enumerate(served[stage].tolist()):
            if not self.malicious[stage, replica] or column not in position_of:
                continue
            for position, micro_batch in enumerate(part.micro_batches):
                yield _Message(Worker(stage, replica), micro_batch, (position_of[column], position))

    def _context(
        self,
        direction: int,
        message: _Message,
        step: int,
        entered: torch.Tensor | None,
        anew: Anew | None,
    ) -> AttackContext:
        worker, index = message.worker, message.index
        memory = self._memory.get((worker, direction))
        previous = self._honest.get((direction, worker, index - 1)) if index else None
        if previous is None and index == 0 and memory is not None:
            previous = memory.previous
        past = memory or Memory(self.needs)
        recomputed = stored = redone = None
        if anew is not None and self.needs.recompute_steps:
            recomputed = partial(anew.with_old_weights, direction, worker.stage, message.at)
        if anew is not None and self.needs.alters_stored and direction == BACKWARD:
            stored = anew.stored(worker.stage, message.at)
            redone = partial(anew.backward_from, worker.stage, message.at)
        return AttackContext(
            DIRECTIONS[direction],
            *worker,
            step,
            index,
            seeded(self._options.seed, step, index, direction, worker),
            start=self._options.start,
            seed=self._options.seed,
            entered=entered,
            previous=previous,
            past=partial(past.history, step, index),
            recomputed=recomputed,
            stored=stored,
            suspicion=self._suspicion,
            redone=redone,
        )

    def _remember(self, direction: int, message: _Message, honest: torch.Tensor, context: AttackContext) -> None:
        if self.needs.uses_previous or self.needs.history_steps:
            self._honest[direction, message.worker, message.index] = honest
        if self._observes:
            self._seen.append((honest, context))

    def _note(self, worker: Worker, step: int) -> None:
        if self.acted_first[worker] < 0:
            self.acted_first[worker] = step


def attackers_of(options: SimulationOptions, mesh: Mesh, malicious: np.ndarray) -> Attackers | None:
    """The attackers of a run; None where nobody tampers."""
    assert malicious.shape == (mesh.stages, mesh.replicas)
    return Attackers(options, malicious) if options.attack is not None and malicious.any() else None


def draw_attackers(mesh: Mesh, per_stage: int, seed: int) -> np.ndarray:
    """Which workers are malicious, bool [S, R]: ``per_stage`` of every middle stage."""
    generator = np.random.default_rng((seed, 2))
    malicious = np.zeros((mesh.stages, mesh.replicas), bool)
    for stage in range(1, mesh.stages - 1):
        malicious[stage, generator.permutation(mesh.replicas)[:per_stage]] = True
    return malicious
