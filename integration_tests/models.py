"""A small causal transformer over bytes as a DeepSpeed pipeline, in the shapes that messages can take."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn
from torch.nn import functional

from integration_tests.scenario import Scenario

VOCABULARY = 256
HEADS = 4
Message = torch.Tensor | tuple[torch.Tensor, ...]


class Embedding(nn.Module):
    """Bytes [B, T] to the first message: hidden [B, T, H], or (hidden, positions [B, T], mask)."""

    def __init__(self, hidden: int, mask: str | None) -> None:
        super().__init__()
        self.mask = mask
        self.table = nn.Embedding(VOCABULARY, hidden)
        nn.init.normal_(self.table.weight, std=0.1)
        if mask == "float":
            self.key_bias = nn.Parameter(torch.zeros(VOCABULARY))

    @property
    def weight(self) -> torch.Tensor:
        return self.table.weight

    def forward(self, inputs: Message) -> Message:
        if self.mask is None:
            assert isinstance(inputs, torch.Tensor)
            return self.table(inputs)
        ids_BT, positions_BT, visible_BT = inputs
        if self.mask == "float":  # how much attention each byte draws, learnt: a message part that has a gradient
            return self.table(ids_BT), positions_BT, self.key_bias[ids_BT]
        return self.table(ids_BT), positions_BT, visible_BT if self.mask == "int" else visible_BT.bool()


class Block(nn.Module):
    """Pre-norm attention and MLP with a residual path; passes on what came beside the hidden state."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, inputs: Message) -> Message:
        if isinstance(inputs, torch.Tensor):
            positions_BT = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape[:2])
            return self._mix(inputs, positions_BT, None)
        hidden_BTH, positions_BT, mask_BT = inputs
        return self._mix(hidden_BTH, positions_BT, mask_BT), positions_BT, mask_BT

    def _mix(self, hidden_BTH: torch.Tensor, positions_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        batch, tokens, hidden = hidden_BTH.shape
        angle = positions_BT[..., None] / 10_000 ** torch.linspace(0, 1, hidden // 2, device=hidden_BTH.device)
        where_BTH = torch.cat([angle.sin(), angle.cos()], dim=-1).to(hidden_BTH.dtype)
        qkv = self.qkv(self.attention_norm(hidden_BTH) + where_BTH).view(batch, tokens, 3, HEADS, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden_BTH.device).tril()
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(~causal_TT, -1e4)
        if mask_BT is not None and mask_BT.is_floating_point():
            scores = scores + mask_BT[:, None, None, :]
        elif mask_BT is not None:
            scores = scores.masked_fill(mask_BT[:, None, None, :] == 0, -1e4)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, hidden)
        hidden_BTH = hidden_BTH + self.out(mixed)
        return hidden_BTH + self.down(functional.gelu(self.up(self.mlp_norm(hidden_BTH))))


class Norm(nn.Module):
    """The final norm; from here on only the hidden state is left."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)

    def forward(self, inputs: Message) -> torch.Tensor:
        return self.norm(inputs if isinstance(inputs, torch.Tensor) else inputs[0])


class Head(nn.Linear):
    """Hidden state to logits."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, VOCABULARY, bias=False)


def _tied_head(embedding: Embedding, hidden_BTH: torch.Tensor) -> torch.Tensor:
    return functional.linear(hidden_BTH, embedding.weight)


def loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats a byte."""
    return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten())


def seed(value: int) -> None:
    # DeepSpeed's own function refuses the numpy integers that its "type:" partitioning hands it. It is called in every
    # forward pass of every layer, and ``torch.manual_seed`` formats a traceback each time.
    torch.default_generator.manual_seed(int(value))


def build_model(scenario: Scenario, stages: int) -> PipelineModule:
    """This rank's stage; the weights depend on the scenario's seed and the layer alone."""
    hidden, mask = scenario.hidden, scenario.tuple_messages
    blocks = [LayerSpec(Block, hidden) for _ in range(stages * scenario.layers_per_stage)]
    embedding, head = LayerSpec(Embedding, hidden, mask), LayerSpec(Head, hidden)
    if scenario.tied:
        embedding = TiedLayerSpec("embedding", Embedding, hidden, mask, tied_weight_attr=["weight"])
        head = TiedLayerSpec("embedding", Embedding, hidden, mask, forward_fn=_tied_head, tied_weight_attr=["weight"])
    return PipelineModule(
        layers=[embedding, *blocks, LayerSpec(Norm, hidden), head],
        num_stages=stages,
        loss_fn=loss,
        partition_method="type:Block",
        seed_layers=True,
        seed_fn=seed,
        base_seed=1000 * (scenario.seed + 1),
        activation_checkpoint_interval=scenario.activation_checkpoint_interval,
        # the embedding's input is integer: reentrant checkpointing would cut it off from autograd
        checkpointable_layers=["Block"],
        dynamic_shape=scenario.dynamic_shape,
    )


@lru_cache
def text() -> np.ndarray:
    """Real text: the source of a module of the standard library, as bytes [N]."""
    source = inspect.getsource(argparse).encode()
    return np.frombuffer(source, dtype=np.uint8)


@lru_cache
def other_text() -> np.ndarray:
    """Text of another kind: made-up JSON, as bytes [N]."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abc", k=draw.randint(1, 5))) for _ in range(8000)]
    rows = [[*words[index : index + 2], draw.randint(0, 30)] for index in range(0, len(words), 2)]
    return np.frombuffer(json.dumps(rows, indent=1).encode(), dtype=np.uint8)


def micro_batch(scenario: Scenario, step: int, replica: int, index: int) -> tuple[Any, torch.Tensor]:
    """(inputs, labels) of one micro-batch; depends on nothing but the arguments, so not on the mesh.

    Labels are [B, T], inputs are bytes [B, T] or, for tuple messages, (bytes, positions, mask); the mask
    hides a few bytes from attention, never a row's first.
    """
    seed = scenario.seed if scenario.data_seed is None else scenario.data_seed
    length = scenario.lengths[step % len(scenario.lengths)]
    draw = np.random.default_rng([seed, step, replica, index])
    turned = scenario.other_text_from is not None and step >= scenario.other_text_from[replica]
    source = other_text() if turned else text()
    starts = draw.integers(0, source.size - length - 1, size=scenario.micro_batch_size)
    window_BT = torch.from_numpy(np.stack([source[at : at + length + 1] for at in starts]).astype(np.int64))
    ids_BT, labels_BT = window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous()
    if scenario.tuple_messages is None:
        return ids_BT, labels_BT
    positions_BT = torch.arange(length).repeat(scenario.micro_batch_size, 1)
    visible_BT = torch.from_numpy((draw.random(ids_BT.shape) > 0.1).astype(np.int64))
    visible_BT[:, 0] = 1
    return (ids_BT, positions_BT, visible_BT), labels_BT


def micro_batches(scenario: Scenario, step: int, replica: int) -> Iterator[tuple[Any, torch.Tensor]]:
    """The micro-batches of one replica in one step; which data: see ``Scenario.data_replicas``."""
    return (micro_batch(scenario, step, replica, index) for index in range(scenario.micro_batches))
