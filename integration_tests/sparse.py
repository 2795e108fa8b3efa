"""A hook for scenarios: the embedding has sparse gradients, as ``torch.nn.Embedding(sparse=True)`` has."""

from __future__ import annotations

from typing import Any

from torch import nn


def sparse(engine: Any, step: int) -> None:
    for module in engine.module.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = True
