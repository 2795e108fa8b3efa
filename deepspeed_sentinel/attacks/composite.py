"""Attacks over other attacks. The inner one is given by name, or path, with its arguments: plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deepspeed_sentinel.attacks.base import Attack, Needs, build_attack, register
from deepspeed_sentinel.attacks.common import check_count, check_number, tokens
from deepspeed_sentinel.attacks.context import AttackContext, seeded


class Composite:
    """What all composites share: they need what their inner attacks need, and let these observe."""

    def __init__(self, *inner: Attack) -> None:
        self.inner = inner
        needs = [Needs.of(attack) for attack in inner]
        if any(need.false_report for need in needs):
            raise ValueError("framing acts on reports and cannot be an inner attack; give it one instead")
        self.uses_entered = any(need.uses_entered for need in needs)
        self.uses_previous = any(need.uses_previous for need in needs)
        self.history_steps = max(need.history_steps for need in needs)
        self.recompute_steps = max(need.recompute_steps for need in needs)
        for name in ("alters_stored", "alters_gradients", "heeds_suspicion", "compares_inputs"):
            if not getattr(type(self), name, False):
                setattr(self, name, any(getattr(need, name) for need in needs))

    def observe(self, message: torch.Tensor, context: AttackContext) -> None:
        for attack in self.inner:
            watch = getattr(attack, "observe", None)
            if watch is not None:
                watch(message, context)


def build_inner(inner: object, arguments: object) -> Attack:
    if not isinstance(inner, str):
        raise ValueError(f"inner must be the name of an attack, got {inner!r}")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"inner_arguments must be an object such as {{'factor': -1}}, got {arguments!r}")
    return build_attack(inner, dict(arguments or {}))


@register("intermittent")
class Intermittent(Composite):
    """The attack ``inner`` with probability ``chance``, drawn anew for each message."""

    def __init__(
        self, inner: str = "scaling", inner_arguments: Mapping[str, Any] | None = None, chance: float = 0.1
    ) -> None:
        check_number("chance", chance, 0.0, 1.0)
        super().__init__(build_inner(inner, inner_arguments))
        self.chance = chance

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        acts = float(torch.rand((), generator=context.generator)) < self.chance
        return self.inner[0](message, context) if acts else message


@register("subset_of_tokens")
class SubsetOfTokens(Composite):
    """The attack ``inner`` on a random share ``fraction`` of the tokens, one at the least."""

    def __init__(
        self, inner: str = "scaling", inner_arguments: Mapping[str, Any] | None = None, fraction: float = 0.05
    ) -> None:
        check_number("fraction", fraction, 0.0, 1.0)
        super().__init__(build_inner(inner, inner_arguments))
        self.fraction = fraction

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        count = len(tokens(message))
        chosen_T = torch.randperm(count, generator=context.generator)[: max(1, round(self.fraction * count))]
        hit_T1 = torch.zeros(count, 1, dtype=torch.bool)
        hit_T1[chosen_T] = True
        tampered_TD = tokens(self.inner[0](message, context))
        return torch.where(hit_T1.to(message.device), tampered_TD, tokens(message)).reshape(message.shape)


@register("slow_drift")
class SlowDrift(Composite):
    """The change that ``inner`` makes, growing from nothing to its whole over ``steps`` steps."""

    def __init__(
        self, inner: str = "scaling", inner_arguments: Mapping[str, Any] | None = None, steps: int = 100
    ) -> None:
        check_count("steps", steps)
        super().__init__(build_inner(inner, inner_arguments))
        self.steps = steps

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        strength = min(1.0, (context.step - context.start) / self.steps)
        honest = message.float()
        change = self.inner[0](message, context).float() - honest
        return (honest + strength * change).to(message.dtype)


_MIXTURE: tuple[Any, ...] = (
    {"attack": "constant"},
    {"attack": "random_value"},
    {"attack": "scaling"},
    {"attack": "invisible_noise"},
    {"attack": "delay"},
)


@register("mixed")
class Mixed(Composite):
    """One of ``attacks`` for each worker, or anew for each message if ``each_message``.

    ``attacks`` lists names, or objects such as {"attack": "scaling", "factor": -1}.
    """

    def __init__(self, attacks: Sequence[str | Mapping[str, Any]] = _MIXTURE, each_message: bool = False) -> None:
        if isinstance(attacks, (str, Mapping)) or not attacks:
            raise ValueError(f"attacks must be a list of names or objects, at least one, got {attacks!r}")
        if not isinstance(each_message, bool):
            raise ValueError(f"each_message must be true or false, got {each_message!r}")
        super().__init__(*(self._build(entry) for entry in attacks))
        self.each_message = each_message

    @staticmethod
    def _build(entry: str | Mapping[str, Any]) -> Attack:
        if isinstance(entry, str):
            return build_attack(entry, {})
        if not isinstance(entry, Mapping) or not isinstance(entry.get("attack"), str):
            raise ValueError(f'attacks must hold names or objects with the key "attack", got {entry!r}')
        return build_attack(entry["attack"], {key: value for key, value in entry.items() if key != "attack"})

    def __call__(self, message: torch.Tensor, context: AttackContext) -> torch.Tensor:
        of_worker = seeded(context.seed, "mixed", context.stage, context.replica)
        generator = context.generator if self.each_message else of_worker
        return self.inner[int(torch.randint(len(self.inner), (), generator=generator))](message, context)
