"""Live fault injection: the ``inject`` block at work on one worker's messages."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deepspeed_sentinel.attacks.base import Attack, AttackContext, build_attack
from deepspeed_sentinel.mesh import Worker


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
    def start_step(self) -> int: ...
    @property
    def stop_step(self) -> int | None: ...
    @property
    def probability(self) -> float: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class _Fault:
    index: int
    settings: InjectionLike
    attack: Attack


class Faults:
    """The faults of one worker. Falsy when it has none.

    Args:
        injections: the whole ``inject`` block; only entries of ``worker`` are kept.
        worker: whose messages are tampered with.
        seed: with step, micro-batch and entry it seeds every draw, so a resumed run repeats exactly.
    """

    def __init__(self, injections: Sequence[InjectionLike], worker: Worker, seed: int) -> None:
        self._worker = worker
        self._seed = seed
        self._faults = tuple(
            _Fault(index, entry, build_attack(entry.attack, entry.arguments))
            for index, entry in enumerate(injections)
            if (entry.stage, entry.replica) == worker
        )

    def __bool__(self) -> bool:
        return bool(self._faults)

    def apply(self, where: str, direction: str, step: int, micro_batch: int, message: torch.Tensor) -> torch.Tensor:
        """The message as tampered with at ``where``; the very same object if nothing acts on it.

        Raises:
            ValueError: an attack gave back another shape, dtype or no tensor at all.
        """
        for fault in self._faults:
            entry = fault.settings
            if (entry.where, entry.direction) != (where, direction) or step < entry.start_step:
                continue
            if entry.stop_step is not None and step >= entry.stop_step:
                continue
            key = f"{self._seed} {fault.index} {step} {micro_batch} {where} {direction} {self._worker}"
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            if float(torch.rand((), generator=generator)) >= entry.probability:
                continue
            context = AttackContext(direction, *self._worker, step, micro_batch, generator)
            with torch.no_grad():
                tampered = fault.attack(message.detach(), context)
            if not isinstance(tampered, torch.Tensor) or (tampered.shape, tampered.dtype) != (
                message.shape,
                message.dtype,
            ):
                got = f"{tampered.dtype} {tuple(tampered.shape)}" if torch.is_tensor(tampered) else repr(tampered)
                raise ValueError(
                    f"attack {type(fault.attack).__name__} must return {message.dtype} {tuple(message.shape)} "
                    f"like the message it got, returned {got}"
                )
            message = tampered
        return message
