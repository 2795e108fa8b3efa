"""Hooks of scenarios: one worker whose numbers about its own messages are wrong, though its messages are not."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed_sentinel.evidence.table import RECEIVED
from deepspeed_sentinel.mesh import FORWARD, Worker

SPOILT_AT, LIES_AT, LIAR = 26, 28, Worker(1, 0)


def spoil_baseline(engine: Any, step: int) -> None:
    """Before one step stage 1 holds NaN in its baseline of what it receives, as a fault before ours would leave it."""
    sentinel = engine.sentinel
    if step == SPOILT_AT and sentinel.worker.stage == 1:
        sentinel._collector._baselines[0]._averages[FORWARD, RECEIVED][5] = float("nan")


def lie_once(engine: Any, step: int) -> None:
    """In one step a worker tells the other replicas a mean of 1e30, in the next one NaN."""
    sentinel = engine.sentinel
    if sentinel.worker != LIAR:
        return
    exchange = sentinel._collector._exchange
    exchange.__dict__.pop("gather_summaries", None)
    lies = {LIES_AT: 1e30, LIES_AT + 1: float("nan")}
    if step in lies:
        honest = exchange.gather_summaries
        exchange.gather_summaries = lambda summary: honest(torch.full_like(summary, lies[step]))
