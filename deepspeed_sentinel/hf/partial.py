"""A stage's part of a model is no model: what would use it as one says so, and what to do instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from deepspeed_sentinel.errors import SentinelError

_USES = ("save_pretrained", "push_to_hub", "generate")
_INSTEAD = {
    "save_pretrained": "SentinelTrainer.save_model(folder), or hf.save_pretrained(pipeline, folder), on every rank",
    "push_to_hub": "SentinelTrainer.save_model(folder) on every rank, then upload the folder",
}
_OTHERWISE = (
    "SentinelTrainer.evaluate() or predict() for losses and logits; for anything else save_model(folder) on every rank "
    "and from_pretrained(folder) in a process of its own"
)


class PartialModel(SentinelError):
    """One stage's part of a model was used as if it were the whole."""


def refuse_as_whole(models: list[nn.Module], stage: int, stages: int, runs: Callable[[], bool]) -> None:
    """Make ``model(...)``, ``save_pretrained``, ``push_to_hub`` and ``generate`` raise PartialModel.

    Args:
        models: the modules that a user may take for the whole model.
        stage, stages: which part of how many they are.
        runs: the pipeline itself is running them, which is allowed.
    """
    for model in models:
        model.register_forward_pre_hook(functools.partial(_check, stage, stages, runs))
        for use in _USES:
            if hasattr(model, use):
                setattr(model, use, functools.partial(_refuse, stage, stages, use))


def _check(stage: int, stages: int, runs: Callable[[], bool], model: nn.Module, inputs: Any) -> None:
    if not runs():
        _refuse(stage, stages, "forward")


def _refuse(stage: int, stages: int, use: str, *_: Any, **__: Any) -> None:
    raise PartialModel(
        f"{use}: this is the part of the model that stage {stage} of {stages} holds; the layers of the other stages "
        f"are missing in it. Use {_INSTEAD.get(use, _OTHERWISE)}."
    )
