"""Sentinel for DeepSpeed: finds the worker that poisons a pipeline, and keeps it out of the weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed_sentinel.config import SentinelConfig
    from deepspeed_sentinel.engine.launch import attach, initialize, install
    from deepspeed_sentinel.engine.sentinel import Sentinel
    from deepspeed_sentinel.errors import LostWorker, SentinelError, SentinelHalt, VerdictMismatch
    from deepspeed_sentinel.judgement.verdict import Verdict
    from deepspeed_sentinel.mesh import Mesh, Worker

__version__ = "0.1.0"

# Resolved on first use: judgement and attacks serve without DeepSpeed, whose import takes seconds.
_HOMES = {
    "attach": "engine.launch",
    "initialize": "engine.launch",
    "install": "engine.launch",
    "Sentinel": "engine.sentinel",
    "SentinelConfig": "config",
    "SentinelError": "errors",
    "SentinelHalt": "errors",
    "LostWorker": "errors",
    "VerdictMismatch": "errors",
    "Verdict": "judgement.verdict",
    "Mesh": "mesh",
    "Worker": "mesh",
}

__all__ = [
    "LostWorker",
    "Mesh",
    "Sentinel",
    "SentinelConfig",
    "SentinelError",
    "SentinelHalt",
    "Verdict",
    "VerdictMismatch",
    "Worker",
    "attach",
    "initialize",
    "install",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
