"""What an attack is, the register of attacks by name, and how one is applied to a message."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from deepspeed_sentinel.attacks.context import AttackContext
from deepspeed_sentinel.attacks.loading import is_path, load_class


class Attack(Protocol):
    """``attack(message, context)`` gives the tampered copy of ``message``: same shape, dtype and device.

    What it needs beyond the message it declares by class attributes of these names (see ``Needs``); it may have a
    method ``observe(message, context)``, which is called with every honest message of its worker, also before it acts.
    """

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor: ...


@dataclass(frozen=True)
class Needs:
    """What an attack declares that it needs, so that nothing is kept for the others.

    Attributes:
        uses_entered: ``context.entered``. Attacks loaded from a file get it unless they declare otherwise.
        uses_previous: ``context.previous``.
        history_steps: how far back ``context.history`` reaches, in steps.
        recompute_steps: how far back ``context.recompute`` reaches, in steps; above 0 it works in the simulator only.
        alters_stored: ``context.stored`` and ``context.backward_from``; works in the simulator only.
        alters_gradients: it acts on the accumulated gradients of its weights, and on no message.
        heeds_suspicion: ``context.suspicion``; compares_inputs: ``context.given_same``. These three work in the
            simulator only.
        false_report: it acts on what a receiver reports, not on what it sends.
        vouches: receivers that take part report tampered messages of other participants as if they were honest.
    """

    uses_entered: bool = False
    uses_previous: bool = False
    history_steps: int = 0
    recompute_steps: int = 0
    alters_stored: bool = False
    alters_gradients: bool = False
    heeds_suspicion: bool = False
    compares_inputs: bool = False
    false_report: bool = False
    vouches: bool = False

    @property
    def simulator_only(self) -> bool:
        more = (self.alters_stored, self.alters_gradients, self.heeds_suspicion, self.compares_inputs)
        return self.recompute_steps > 0 or any(more)

    @classmethod
    def of(cls, attack: Attack) -> Needs:
        found = {name: getattr(attack, name) for name in cls.__dataclass_fields__ if hasattr(attack, name)}
        built_in = any(type(attack) is known for known in _ATTACKS.values())
        return cls(**{"uses_entered": not built_in, **found})


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


def attack_class(name: str) -> Callable[..., Attack]:
    """The class behind a registered name or behind ``path/to/file.py:ClassName``.

    Raises:
        ValueError: unknown name, or nothing usable at that path.
    """
    if is_path(name):
        return load_class(name)
    if name not in _ATTACKS:
        simulated = [known for known in attack_names() if Needs.of(build_attack(known, {})).simulator_only]
        live = ", ".join(known for known in attack_names() if known not in simulated)
        raise ValueError(
            f"attack {name!r} is unknown; allowed: {live}, or path/to/file.py:ClassName; in the simulator alone: "
            f"{', '.join(simulated)}"
        )
    return _ATTACKS[name]


def build_attack(name: str, arguments: Mapping[str, Any]) -> Attack:
    """Build an attack by its registered name or from ``path/to/file.py:ClassName``.

    Raises:
        ValueError: unknown name, unknown or missing argument, or a value the attack does not take.
    """
    cls = attack_class(name)
    signature = inspect.signature(cls)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        allowed = ", ".join(signature.parameters) or "none"
        raise ValueError(f"attack {name!r}: {error}; its arguments are: {allowed}") from None
    try:
        attack = cls(**arguments)
    except ValueError as error:
        raise ValueError(f"attack {name!r}: {error}") from error
    except Exception as error:
        raise ValueError(f"attack {name!r} cannot be built: {type(error).__name__}: {error}") from error
    if not callable(attack):
        raise ValueError(f"attack {name!r} has no __call__(message, context), so it cannot act on a message")
    return attack


def _name(attack: Attack, context: AttackContext) -> str:
    return (
        f"attack {type(attack).__name__} ({context.direction}, stage {context.stage}, replica {context.replica}, "
        f"step {context.step}, micro-batch {context.micro_batch})"
    )


@torch.no_grad()
def apply_attack(attack: Attack, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
    """The message as tampered with; ``message`` itself stays as it is, whatever the attack does.

    Raises:
        ValueError: the attack raised, or gave back another shape, dtype, device or no tensor at all.
    """
    try:
        tampered = attack(message.detach().clone(), context)
    except Exception as error:
        raise ValueError(f"{_name(attack, context)} raised {type(error).__name__}: {error}") from error
    like = (message.shape, message.dtype, message.device)
    if not isinstance(tampered, torch.Tensor):
        got = f"{type(tampered).__name__} {tampered!r}"
    elif (tampered.shape, tampered.dtype, tampered.device) != like:
        got = f"{tampered.dtype} {tuple(tampered.shape)} on {tampered.device}"
    else:
        return tampered.detach()
    wanted = f"{message.dtype} {tuple(message.shape)} on {message.device}"
    raise ValueError(f"{_name(attack, context)} must return {wanted}, like the message it got, but returned {got}")


@torch.no_grad()
def show_honest(attack: Attack, message: torch.Tensor, context: AttackContext) -> None:
    """Let an attack that observes see an honest message.

    Raises:
        ValueError: its ``observe`` raised.
    """
    observe = getattr(attack, "observe", None)
    if observe is None:
        return
    try:
        observe(message.detach().clone(), context)
    except Exception as error:
        raise ValueError(f"{_name(attack, context)}: observe raised {type(error).__name__}: {error}") from error
