"""Faults of one worker, put in by hooks on its module and engine, so that no tool's own injector favours it.

Each is a function of the culprit's engine that puts the fault in and returns what takes it out again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from integration_tests.models import Block

Undo = Callable[[], None]


def _last_block(engine: Any) -> Block:
    return next(layer for layer in reversed(engine.module.forward_funcs) if isinstance(layer, Block))


def _on_output(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Undo]:
    """What the last block of the stage makes comes out changed; a replay of that block runs the same hook."""

    def put_in(engine: Any) -> Undo:
        return _last_block(engine).register_forward_hook(lambda block, entered, made: change(made)).remove

    return put_in


def rounded(made: torch.Tensor) -> torch.Tensor:
    """Each token rounded to 255 steps of its largest element, as int8 would; the gradient passes straight through."""
    step = made.detach().abs().amax(-1, keepdim=True) / 127
    return made + ((made / step).round() * step - made).detach()


def flip_bit(engine: Any) -> Undo:
    """Inside the last block the highest bit of the mantissa of one element is inverted in every micro-batch."""

    def flip(layer: torch.nn.Module, entered: Any, made: torch.Tensor) -> torch.Tensor:
        wrong = made.detach().clone()
        wrong.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 22)
        return made + (wrong - made).detach()

    return _last_block(engine).up.register_forward_hook(flip).remove


def old_weights(engine: Any) -> Undo:
    """It goes on computing with the weights that it has now."""
    kept = [parameter.detach().clone() for parameter in engine.module.parameters()]

    def put_back(*_: Any) -> None:
        with torch.no_grad():
            for parameter, old in zip(engine.module.parameters(), kept, strict=True):
                parameter.copy_(old)

    return engine.module.forward_funcs[0].register_forward_pre_hook(put_back).remove


def gradients_too_large(engine: Any) -> Undo:
    """Gradients of its weights are one hundredth too large; its messages are right."""
    hooks = [parameter.register_hook(lambda gradient: gradient * 1.01) for parameter in engine.module.parameters()]
    return lambda: [hook.remove() for hook in hooks] and None


def other_gradients_reduced(engine: Any) -> Undo:
    """Its gradients change their sign after everything has been computed, just before they are reduced."""
    honest = engine.allreduce_gradients

    def reduce(**options: Any) -> None:
        for parameter in engine.module.parameters():
            parameter.grad.neg_()
        honest(**options)

    engine.allreduce_gradients = reduce

    def undo() -> None:
        engine.allreduce_gradients = honest

    return undo


def flip_weight(engine: Any) -> Undo:
    """The lowest bit of one weight is inverted in memory."""
    weight = next(_last_block(engine).parameters())
    weight.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    return lambda: None


@dataclass(frozen=True)
class Fault:
    """Attributes:
    what: in words.
    put_in: see above.
    lasts: until the end of the run; else for one step.
    in_gradients: what the worker adds to the reduction is wrong while it lasts.
    """

    what: str
    put_in: Callable[[Any], Undo]
    lasts: bool
    in_gradients: bool = True


FAULTS = {
    "negated": Fault("the stage's output times -1", _on_output(torch.neg), lasts=True),
    "negated_once": Fault("the stage's output times -1, in one step", _on_output(torch.neg), lasts=False),
    "rounded": Fault("the stage's output rounded as to int8", _on_output(rounded), lasts=True),
    "bit": Fault("one bit of one activation inside a layer", flip_bit, lasts=True),
    "bit_once": Fault("one bit of one activation inside a layer, in one step", flip_bit, lasts=False),
    "old_weights": Fault("weights that are no longer updated", old_weights, lasts=True),
    "gradients": Fault("gradients of weights 1 % too large", gradients_too_large, lasts=True),
    "reduced": Fault("gradients negated just before they are reduced", other_gradients_reduced, lasts=True),
    "weight": Fault("one bit of one weight, once", flip_weight, lasts=False, in_gradients=False),
}
