"""Live fault injection: the ``inject`` block at work on one worker's messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from deepspeed_sentinel.attacks.base import Needs, apply_attack, build_attack, show_honest
from deepspeed_sentinel.attacks.context import AttackContext, seeded
from deepspeed_sentinel.attacks.memory import Memory
from deepspeed_sentinel.mesh import Worker

Tensors = Sequence[torch.Tensor]


class InjectionLike(Protocol):
    """What is needed of one entry of the ``inject`` block."""

    @property
    def stage(self) -> int: ...
    @property
    def replica(self) -> int: ...
    @property
    def direction(self) -> str: ...
    @property
    def where(self) -> str: ...
    @property
    def attack(self) -> str: ...
    @property
    def tensor(self) -> int | None: ...
    @property
    def start_step(self) -> int: ...
    @property
    def stop_step(self) -> int | None: ...
    @property
    def probability(self) -> float: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...


class _Fault:
    def __init__(self, index: int, settings: InjectionLike) -> None:
        self.index = index
        self.settings = settings
        self.attack = build_attack(settings.attack, settings.arguments)
        self.needs = Needs.of(self.attack)
        self.memory = Memory(self.needs)

    def acts(self, step: int, generator: torch.Generator) -> bool:
        entry = self.settings
        if step < entry.start_step or (entry.stop_step is not None and step >= entry.stop_step):
            return False
        return float(torch.rand((), generator=generator)) < entry.probability


class Faults:
    """The faults of one worker. Falsy when it has none.

    What an attack remembers is not part of checkpoints: after a resumption ``delay`` is honest at first.

    Args:
        injections: the whole ``inject`` block; only entries of ``worker`` are kept.
        worker: whose messages are tampered with.
        seed: with step, micro-batch and entry it seeds every draw, so a resumed run repeats exactly.
    """

    def __init__(self, injections: Sequence[InjectionLike], worker: Worker, seed: int) -> None:
        self._worker = worker
        self._seed = seed
        self._faults = tuple(
            _Fault(index, entry) for index, entry in enumerate(injections) if (entry.stage, entry.replica) == worker
        )
        self._keeps_entered = {fault.settings.direction for fault in self._faults if fault.needs.uses_entered}
        self._entered: dict[tuple[str, int], tuple[torch.Tensor, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._faults)

    def enter(self, direction: str, micro_batch: int, message: Tensors) -> None:
        """Keep what enters the stage until the message that it becomes has left, where an attack needs it."""
        if direction in self._keeps_entered:
            self._entered[direction, micro_batch] = tuple(tensor.detach().clone() for tensor in message)

    def apply(self, where: str, direction: str, step: int, micro_batch: int, message: Tensors) -> Tensors:
        """The tensors of a message as tampered with at ``where``; the very same object if nothing acts on it.

        Each fault acts on the tensor that it names, by default on the hidden state: the floating-point one of
        the most features.

        Raises:
            ValueError: an attack raised, or gave back another shape, dtype or no tensor at all; or a message has no
                such tensor.
        """
        entered = self._entered.get((direction, micro_batch))
        for fault in self._faults:
            entry = fault.settings
            if (entry.where, entry.direction) != (where, direction):
                continue
            index = _target(entry.tensor, message)
            generator = seeded(self._seed, fault.index, step, micro_batch, where, direction, self._worker)
            context = AttackContext(
                direction,
                *self._worker,
                step,
                micro_batch,
                generator,
                start=entry.start_step,
                seed=self._seed,
                entered=_counterpart(entered, message, index) if entered and fault.needs.uses_entered else None,
                previous=fault.memory.previous,
                past=partial(fault.memory.history, step, micro_batch),
            )
            honest = message[index]
            show_honest(fault.attack, honest, context)
            if fault.acts(step, generator):
                tampered = apply_attack(fault.attack, honest, context)
                message = [*message[:index], tampered, *message[index + 1 :]]
            fault.memory.put(step, micro_batch, honest)
        if where == "transit":
            self._entered.pop((direction, micro_batch), None)
        return message


def _target(named: int | None, message: Tensors) -> int:
    if named is None:
        floating = [index for index, tensor in enumerate(message) if tensor.is_floating_point()]
        return max(floating, key=lambda index: (_features(message[index]), message[index].numel()), default=0)
    if named >= len(message):
        raise ValueError(f'inject: "tensor": {named}, but the message has {len(message)} tensors, counted from 0')
    return named


def _features(tensor: torch.Tensor) -> int:
    """How wide a token is; of an image, or of a mask over pairs of tokens, how many channels there are."""
    return tensor.shape[1] if tensor.dim() >= 4 else tensor.shape[-1] if tensor.dim() >= 2 else 1


def _counterpart(entered: Tensors, message: Tensors, index: int) -> torch.Tensor | None:
    """What entered in the place of a tensor that leaves: the same place in a message of as many tensors, else the
    hidden state."""
    return entered[index if len(entered) == len(message) else _target(None, entered)]
