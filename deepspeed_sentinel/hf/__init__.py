"""Hugging Face: a transformers causal LM as a guarded DeepSpeed pipeline, and the Trainer people know."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed_sentinel.hf.batches import announce_shapes, step_batches, to_batch
    from deepspeed_sentinel.hf.callback import SentinelCallback
    from deepspeed_sentinel.hf.partial import PartialModel
    from deepspeed_sentinel.hf.pipeline import CausalLMPipeline, to_pipeline
    from deepspeed_sentinel.hf.saving import save_pretrained
    from deepspeed_sentinel.hf.trainer import SentinelTrainer

_NEEDED = ("transformers", "accelerate", "tokenizers", "safetensors")
# Resolved on first use: transformers takes seconds to import.
_HOMES = {
    "CausalLMPipeline": "pipeline",
    "PartialModel": "partial",
    "to_pipeline": "pipeline",
    "SentinelCallback": "callback",
    "SentinelTrainer": "trainer",
    "save_pretrained": "saving",
    "announce_shapes": "batches",
    "step_batches": "batches",
    "to_batch": "batches",
}

__all__ = [
    "CausalLMPipeline",
    "PartialModel",
    "SentinelCallback",
    "SentinelTrainer",
    "announce_shapes",
    "save_pretrained",
    "step_batches",
    "to_batch",
    "to_pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        raise ImportError(f'{name} needs {error.name}: pip install ".[transformers]" in a clone') from error
    return getattr(home, name)
