"""Small pipelines with messages that cannot be judged. Chosen by ``Scenario.kind``:

empty  hidden state; one micro-batch of replica 1 has no tokens at step 2
ids    the first stage hands token ids on, and nothing else
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

from integration_tests.models_of_parts import CLASSES, TOKENS, loss, one_layer_a_stage
from integration_tests.scenario import Scenario

EMPTY_AT = 2


class Stage(nn.Module):
    def __init__(self, place: str, hidden: int, kind: str) -> None:
        super().__init__()
        self.embeds = place == ("last" if kind == "ids" else "first")
        self.passes_on = kind == "ids" and place != "last"
        self.embedding, self.layer = nn.Embedding(CLASSES, hidden), nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, CLASSES) if place == "last" else None

    def forward(self, inputs: Any) -> Any:
        if self.passes_on:
            return (inputs, inputs + 0) if isinstance(inputs, torch.Tensor) else inputs
        hidden_BTH = self.embedding(inputs[0] if isinstance(inputs, tuple) else inputs) if self.embeds else inputs
        hidden_BTH = hidden_BTH + self.layer(hidden_BTH).tanh()
        return hidden_BTH if self.head is None else self.head(hidden_BTH)


def build_model(scenario: Scenario, stages: int) -> PipelineModule:
    places = ["first", *["middle"] * (stages - 2), "last"]
    layers = [LayerSpec(Stage, place, scenario.hidden, scenario.kind) for place in places]
    return one_layer_a_stage(layers, loss, scenario)


def micro_batches(scenario: Scenario, step: int, replica: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for index in range(scenario.micro_batches):
        draw = torch.Generator().manual_seed(1_000 * step + 10 * replica + index)
        empty = scenario.kind == "empty" and (step, replica, index) == (EMPTY_AT, 1, 1)
        ids = torch.randint(CLASSES, (scenario.micro_batch_size, 0 if empty else TOKENS), generator=draw)
        yield ids, (ids + 1) % CLASSES


def disagree(engine: Any, step: int) -> None:
    """Before each step: from step 2 on rank 2 comes to another verdict."""
    if torch.distributed.get_rank() == 2 and step == EMPTY_AT:
        judge = engine.sentinel.gate.judge
        honest = judge.step

        def judge_otherwise(*arguments: Any) -> Any:
            verdict = honest(*arguments)
            return type(verdict)(**{**vars(verdict), "warming_up": not verdict.warming_up})

        judge.step = judge_otherwise
