"""Faults of one worker that no message is tampered with for: hooks of scenarios."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

STAGE, REPLICA, START, OLD = 1, 2, 4, 3
_past: deque[list[torch.Tensor]] = deque(maxlen=OLD + 1)


def _is_culprit(engine: Any) -> bool:
    return (engine.stage_id, engine.grid.get_data_parallel_id()) == (STAGE, REPLICA)


def stale_weights(engine: Any, step: int) -> None:
    """From START on, compute with the weights of OLD steps ago."""
    if not _is_culprit(engine):
        return
    if step == 0:
        _past.clear()
    _past.append([parameter.detach().clone() for parameter in engine.module.parameters()])
    if step >= START:
        for parameter, old in zip(engine.module.parameters(), _past[0], strict=True):
            parameter.data.copy_(old)


def wrong_gradients(engine: Any, step: int) -> None:
    """From START on, gradients of weights are one hundredth too large; messages are right."""
    if _is_culprit(engine) and step == START:
        for parameter in engine.module.parameters():
            parameter.register_hook(lambda gradient: gradient * 1.01)
