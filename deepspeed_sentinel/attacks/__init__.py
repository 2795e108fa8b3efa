"""The red team: ways to tamper with a message. Used by fault injection, drills, simulator and tests alike."""

from deepspeed_sentinel.attacks import altering as _altering  # noqa: F401  (each of these registers its attacks)
from deepspeed_sentinel.attacks import composite as _composite  # noqa: F401
from deepspeed_sentinel.attacks import evading as _evading  # noqa: F401
from deepspeed_sentinel.attacks import hardware as _hardware  # noqa: F401
from deepspeed_sentinel.attacks import imitating as _imitating  # noqa: F401
from deepspeed_sentinel.attacks import replacing as _replacing  # noqa: F401
from deepspeed_sentinel.attacks import stale as _stale  # noqa: F401
from deepspeed_sentinel.attacks import teams as _teams  # noqa: F401
from deepspeed_sentinel.attacks.base import (
    Attack,
    AttackContext,
    Needs,
    apply_attack,
    attack_names,
    build_attack,
    register,
)

__all__ = [
    "Attack",
    "AttackContext",
    "Needs",
    "apply_attack",
    "attack_names",
    "build_attack",
    "register",
]
