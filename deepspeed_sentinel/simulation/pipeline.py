"""One pass of all columns through all stages, with something standing on every link.

The hidden state is cut from the graph at each link, so that what crosses can be altered; gradients are carried back
over the links by hand. A message is one micro-batch of one column; a gradient message is the gradient of that
micro-batch's own mean loss.

Dimension key: C columns, M micro-batches, B sequences of a micro-batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def train_pass(
    stages: Sequence[nn.Module], ids_CMBT: torch.Tensor, labels_CMBT: torch.Tensor, links: Links
) -> torch.Tensor:
    """Forward and backward; adds the *sum* of all messages' gradients to the weights' ``.grad``.

    Returns:
        float32 [C, M], the mean loss of each message in nats a token.
    """
    messages = ids_CMBT.shape[:3]

    def as_message(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().view(*messages, *tensor.shape[1:])

    inputs: list[torch.Tensor] = [ids_CMBT.flatten(0, 2)]
    outputs: list[torch.Tensor] = []
    for index, stage in enumerate(stages):
        outputs.append(stage(inputs[index]))
        if index < len(stages) - 1:
            entered = as_message(inputs[index]) if index else None
            received = links.cross(FORWARD, index, as_message(outputs[index]), entered)
            inputs.append(received.reshape(outputs[index].shape).detach().requires_grad_())
    losses_CM = message_losses(outputs[-1], labels_CMBT)
    losses_CM.sum().backward()
    gradient: torch.Tensor | None = None
    for index in range(len(stages) - 1, 0, -1):
        if gradient is not None:
            outputs[index].backward(gradient)
        entered = None if gradient is None else as_message(gradient)
        made = inputs[index].grad
        assert made is not None
        gradient = links.cross(BACKWARD, index - 1, as_message(made), entered).reshape(made.shape)
    outputs[0].backward(gradient)
    return losses_CM.detach()


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
