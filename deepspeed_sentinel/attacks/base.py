"""What an attack is, and the register of attacks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch


@dataclass(frozen=True)
class AttackContext:
    """Where and when an attack acts. ``generator`` is seeded by all of it, so a run repeats exactly."""

    direction: str
    stage: int
    replica: int
    step: int
    micro_batch: int
    generator: torch.Generator


class Attack(Protocol):
    """``attack(message, context)`` gives the tampered copy of ``message``: same shape, dtype and device."""

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor: ...


_ATTACKS: dict[str, Callable[..., Attack]] = {}
_Class = TypeVar("_Class", bound=type)


def register(name: str) -> Callable[[_Class], _Class]:
    """Class decorator: make an attack known by ``name``."""

    def decorate(cls: _Class) -> _Class:
        _ATTACKS[name] = cls
        return cls

    return decorate


def attack_names() -> tuple[str, ...]:
    return tuple(sorted(_ATTACKS))


def build_attack(name: str, arguments: Mapping[str, Any]) -> Attack:
    """Build a registered attack.

    Raises:
        ValueError: unknown name, unknown or missing argument, or a value the attack does not take.
    """
    if name not in _ATTACKS:
        raise ValueError(f"attack {name!r} is unknown; allowed: {', '.join(attack_names())}")
    cls = _ATTACKS[name]
    allowed = tuple(inspect.signature(cls).parameters)
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"attack {name!r}: {error}; its arguments are: {', '.join(allowed) or 'none'}") from None
    return cls(**arguments)
