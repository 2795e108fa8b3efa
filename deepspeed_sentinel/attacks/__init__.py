"""The red team: ways to tamper with a message. Used by fault injection, drills and tests alike."""

from deepspeed_sentinel.attacks import library as _library  # noqa: F401  (registers the attacks)
from deepspeed_sentinel.attacks.base import Attack, AttackContext, attack_names, build_attack, register

__all__ = ["Attack", "AttackContext", "attack_names", "build_attack", "register"]
