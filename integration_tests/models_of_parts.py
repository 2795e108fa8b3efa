"""Small pipelines whose messages are more than one hidden state: images, two float tensors, labels that are missing.

Chosen by ``Scenario.kind``:

    images      convolutions, [B, C, H, W], of a size that changes from step to step; the middle stages halve it
    mask_first  (a float mask of attention, hidden state), both with gradients
    unlabelled  hidden state; in some micro-batches all labels are to be ignored
    carried     (hidden state, position ids, a token count), the last two handed on as they are
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from torch.nn import functional

from integration_tests.models import seed
from integration_tests.scenario import Scenario

CLASSES, TOKENS = 8, 24
IGNORED = -100


class Images(nn.Module):
    """One stage's layer of the "images" pipeline."""

    def __init__(self, place: str, hidden: int) -> None:
        super().__init__()
        self.place = place
        self.convolution = nn.Conv2d(3 if place == "first" else hidden, hidden, 3, padding=1)
        self.head = nn.Linear(hidden, CLASSES) if place == "last" else None

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW = self.convolution(x_BCHW).tanh()
        if self.head is not None:
            return self.head(y_BCHW.mean((2, 3)))
        return functional.max_pool2d(y_BCHW, 2) if self.place == "middle" else y_BCHW


class Parts(nn.Module):
    """One stage's layer of the others: a residual step on the hidden state, and what else there is handed on."""

    def __init__(self, place: str, hidden: int, kind: str) -> None:
        super().__init__()
        self.place, self.kind = place, kind
        self.layer = nn.Linear(hidden, hidden)
        self.embedding = nn.Embedding(CLASSES, hidden) if place == "first" else None
        self.head = nn.Linear(hidden, CLASSES) if place == "last" else None

    def forward(self, inputs: Any) -> Any:
        mask_BTT: torch.Tensor | None = None
        others: tuple[torch.Tensor, ...] = ()
        if self.embedding is not None:
            hidden_BTH = self.embedding(inputs)
            if self.kind == "mask_first":
                mask_BTT = hidden_BTH.new_zeros(len(inputs), 1, TOKENS, TOKENS).requires_grad_()
            if self.kind == "carried":
                positions_BT = torch.arange(TOKENS).expand(inputs.shape).contiguous()
                others = (positions_BT, torch.tensor([inputs.numel()]))
        elif self.kind == "mask_first":
            mask_BTT, hidden_BTH = inputs
        elif self.kind == "carried":
            hidden_BTH, *others = inputs
        else:
            hidden_BTH = inputs
        mixed_BTH = hidden_BTH
        if mask_BTT is not None:
            mixed_BTH = mask_BTT[:, 0].softmax(-1) @ hidden_BTH
        if others:
            mixed_BTH = hidden_BTH + (others[0][..., None] / TOKENS).sin()
        hidden_BTH = hidden_BTH + 0.3 * self.layer(mixed_BTH).tanh()
        if self.head is not None:
            return self.head(hidden_BTH)
        if mask_BTT is not None:
            return mask_BTT * 1.0, hidden_BTH
        return (hidden_BTH, *others) if others else hidden_BTH


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the labels that count; exactly zero without any."""
    logits, labels = logits.reshape(-1, CLASSES), labels.flatten()
    counted = (labels != IGNORED).sum().clamp_min(1)
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / counted


def build_model(scenario: Scenario, stages: int) -> PipelineModule:
    places = ["first", *["middle"] * (stages - 2), "last"]
    if scenario.kind == "images":
        layers = [LayerSpec(Images, place, scenario.hidden) for place in places]
    else:
        layers = [LayerSpec(Parts, place, scenario.hidden, scenario.kind) for place in places]
    return one_layer_a_stage(layers, loss, scenario)


def one_layer_a_stage(layers: list[LayerSpec], loss_fn: Any, scenario: Scenario) -> PipelineModule:
    """A pipeline of as many stages as layers, seeded and shaped as the scenario says."""
    return PipelineModule(
        layers=layers,
        num_stages=len(layers),
        loss_fn=loss_fn,
        partition_method="uniform",
        seed_layers=True,
        seed_fn=seed,
        base_seed=scenario.seed,
        dynamic_shape=scenario.dynamic_shape,
    )


def micro_batches(scenario: Scenario, step: int, replica: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for index in range(scenario.micro_batches):
        draw = torch.Generator().manual_seed(1_000_000 * scenario.seed + 1_000 * step + 10 * replica + index)
        batch = scenario.micro_batch_size
        if scenario.kind == "images":
            size = scenario.lengths[step % len(scenario.lengths)]
            labels = torch.randint(CLASSES, (batch,), generator=draw)
            yield torch.randn(batch, 3, size, size, generator=draw) + labels[:, None, None, None] / 4, labels
            continue
        ids = torch.randint(CLASSES, (batch, TOKENS), generator=draw)
        labels = (ids + 1) % CLASSES
        if scenario.kind == "unlabelled" and (step + index + replica) % 5 == 0:
            labels = torch.full_like(labels, IGNORED)
        yield ids, labels
