"""A hook for scenarios: the batch grows and shrinks on the way, as ``engine.set_train_batch_size`` lets it."""

from __future__ import annotations

from typing import Any

MICRO_BATCHES = {0: 2, 5: 4, 8: 3}  # from which step on, of a scenario with four


def ramp(engine: Any, step: int) -> None:
    if step in MICRO_BATCHES:
        a_micro_batch = engine.train_micro_batch_size_per_gpu() * engine.dp_world_size
        engine.set_train_batch_size(MICRO_BATCHES[step] * a_micro_batch)
