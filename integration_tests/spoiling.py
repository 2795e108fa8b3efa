"""Hooks of scenarios: one worker whose numbers about its own messages are wrong, though its messages are not."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed_sentinel.evidence.table import RECEIVED
from deepspeed_sentinel.mesh import FORWARD, Worker

SPOILT_AT, LIES_AT, LIAR = 7, 9, Worker(1, 0)
CONVICTED_AT = 11


def spoil_checkpoint(engine: Any, step: int) -> None:
    """What stage 1 saves after one step of its baseline of what it receives has a NaN in it."""
    sentinel = engine.sentinel
    sentinel.__dict__.pop("state_dict", None)
    if step != SPOILT_AT or sentinel.worker.stage != 1:
        return
    sound = sentinel.state_dict

    def spoilt() -> dict[str, Any]:
        state = sound()
        state["evidence"]["baselines"]["0"][f"average_{FORWARD}_{RECEIVED}"][5] = float("nan")
        return state

    sentinel.state_dict = spoilt


def convict_elsewhere(engine: Any, step: int) -> None:
    """The checkpoint says that whoever is convicted ran on another host."""
    sentinel = engine.sentinel
    if step != CONVICTED_AT:
        return
    sound = sentinel.state_dict

    def elsewhere() -> dict[str, Any]:
        state = sound()
        for convict in state["convicts"]:
            convict["device"]["host"] = "another-host"
        return state

    sentinel.state_dict = elsewhere


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
