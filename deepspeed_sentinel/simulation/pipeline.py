"""One pass of all columns through all stages, with something standing on every link.

The hidden state is cut from the graph at each link, so that what crosses can be altered; gradients are carried back
over the links by hand. A message is one micro-batch of one column; a gradient message is the gradient of that
micro-batch's own mean loss.

Dimension key: C columns, M micro-batches, B sequences of a micro-batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from deepspeed_sentinel.mesh import BACKWARD, FORWARD


class Links(Protocol):
    """What stands on the links."""

    def cross(
        self, direction: int, link: int, sent_CMBTD: torch.Tensor, entered_CMBTD: torch.Tensor | None
    ) -> torch.Tensor:
        """What the receivers get for what the senders made; ``entered`` is what came into the sending stage."""
        ...


class Wire:
    """Links on which nothing happens."""

    def cross(
        self, direction: int, link: int, sent_CMBTD: torch.Tensor, entered_CMBTD: torch.Tensor | None
    ) -> torch.Tensor:
        return sent_CMBTD


@dataclass(frozen=True)
class Pass:
    """What a pass leaves.

    Attributes:
        losses_CM: float32 [C, M], the mean loss of each message in nats a token.
        gradients: of each column one tensor a weight, in the order of ``weights_of``, summed over the column's
            messages; None for a weight that had no part. Empty where columns were not kept apart.
    """

    losses_CM: torch.Tensor
    gradients: tuple[tuple[torch.Tensor | None, ...], ...] = ()


def weights_of(stages: Sequence[nn.Module]) -> list[nn.Parameter]:
    """All weights, stage by stage."""
    return [weight for stage in stages for weight in stage.parameters()]


def train_pass(
    stages: Sequence[nn.Module],
    ids_CMBT: torch.Tensor,
    labels_CMBT: torch.Tensor,
    links: Links,
    apart: bool = False,
) -> Pass:
    """Forward and backward.

    Args:
        stages: the model.
        ids_CMBT, labels_CMBT: token ids, int64.
        links: what stands between the stages.
        apart: compute column by column and keep each column's gradients for itself, so that any of them can be left
            out afterwards; otherwise all columns are one batch, and the sum of all messages' gradients is added to
            the weights' ``.grad``. The two differ in the order of sums alone.
    """
    messages, columns = ids_CMBT.shape[:3], ids_CMBT.shape[0]
    parts = columns if apart else 1

    def as_message(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        return whole.detach().view(*messages, *whole.shape[1:])

    def split(crossed_CMBTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return crossed_CMBTD.flatten(0, 2).chunk(parts)

    inputs: list[tuple[torch.Tensor, ...]] = [split(ids_CMBT)]
    outputs: list[list[torch.Tensor]] = []
    for index, stage in enumerate(stages):
        outputs.append([stage(entered) for entered in inputs[index]])
        if index < len(stages) - 1:
            entered = as_message(inputs[index]) if index else None
            received = links.cross(FORWARD, index, as_message(outputs[index]), entered)
            inputs.append(tuple(part.detach().requires_grad_() for part in split(received)))
    losses = [message_losses(part, labels) for part, labels in zip(outputs[-1], labels_CMBT.chunk(parts), strict=True)]
    kept: list[list[tuple[torch.Tensor | None, ...]]] = [[] for _ in stages]
    gradient: Sequence[torch.Tensor | None] = [None] * parts
    for index in range(len(stages) - 1, -1, -1):
        ends = [loss.sum() for loss in losses] if index == len(stages) - 1 else outputs[index]
        if apart:
            for end, carried, leaf in zip(ends, gradient, inputs[index], strict=True):
                kept[index].append(_gradients(stages[index], end, carried, leaf if index else None))
        else:
            ends[0].backward(gradient[0])
        if index:
            made = []
            for leaf in inputs[index]:
                assert leaf.grad is not None
                made.append(leaf.grad)
            entered = None if gradient[0] is None else as_message([part for part in gradient if part is not None])
            gradient = split(links.cross(BACKWARD, index - 1, as_message(made), entered))
    by_column = tuple(tuple(g for stage in kept for g in stage[column]) for column in range(columns if apart else 0))
    return Pass(torch.cat([part.detach() for part in losses]), by_column)


def _gradients(
    stage: nn.Module, end: torch.Tensor, carried: torch.Tensor | None, leaf: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the stage's weights alone; that of what entered is left in ``leaf.grad``."""
    weights = list(stage.parameters())
    wanted = weights if leaf is None else [*weights, leaf]
    found = torch.autograd.grad(end, wanted, carried, allow_unused=True)
    if leaf is None:
        return found
    leaf.grad = found[-1]
    return found[:-1]


def message_losses(logits: torch.Tensor, labels_CMBT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each message, float32 [C, M], from logits [C * M * B, T, V]."""
    per_token = functional.cross_entropy(logits.flatten(0, 1).float(), labels_CMBT.flatten(), reduction="none")
    return per_token.view(labels_CMBT.shape).mean((2, 3))


@torch.no_grad()
def held_out_loss(stages: Sequence[nn.Module], ids_BT: torch.Tensor, labels_BT: torch.Tensor, at_once: int) -> float:
    """Mean loss in nats a token over the given sequences, ``at_once`` of them at a time."""
    total = 0.0
    for ids, labels in zip(ids_BT.split(at_once), labels_BT.split(at_once), strict=True):
        hidden = ids
        for stage in stages:
            hidden = stage(hidden)
        total += float(functional.cross_entropy(hidden.flatten(0, 1).float(), labels.flatten(), reduction="sum"))
    return total / labels_BT.numel()
