"""The loss of a step, or of an evaluation, in which columns were left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.response.gate import Share


def mean_of_included(
    engine: PipelineEngine, share: Share, skipped: bool, original: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """The engine's mean loss over the columns that took part; NaN when none did. Collective.

    Args:
        engine: the engine.
        share: of this worker's column.
        skipped: no column took part.
        original: the engine's own ``_aggregate_total_loss``.
    """
    own = engine.total_loss
    if engine.is_last_stage():
        share.apply_(_tensors([engine.total_loss, *(engine.total_additional_losses or {}).values()]))
    mean = original()
    if own is not None and share.included:
        engine.dp_group_loss /= share.factor
    return torch.full_like(mean, float("nan")) if skipped else mean


def mean_without(
    out_C: np.ndarray, column: int, losses: Sequence[torch.Tensor], original: Callable[[Any], torch.Tensor]
) -> torch.Tensor:
    """The mean loss of an evaluation over the columns that count; NaN where none does. Collective in the last stage.

    Args:
        out_C: bool [C], columns that do not count.
        column: this worker's.
        losses: of its micro-batches.
        original: the engine's own ``_reduce_outputs``, which takes them to the mean over all columns.
    """
    own = [loss.clone() for loss in losses]
    Share.of(out_C, column).apply_(own)
    mean = original(own)
    return torch.full_like(mean, float("nan")) if out_C.all() else mean


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not tensors:
        raise SentinelError("the last stage has no tensor loss to average over the included columns")
    return tensors
