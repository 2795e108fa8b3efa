"""Which rank a stage's neighbour is: the seam to DeepSpeed's point-to-point module.

Only messages between neighbouring stages go by the wiring. The loss, tied weights, data, checkpoints and the reduction
of gradients keep DeepSpeed's grid. Replicas of a stage hold the same weights, so who serves a column changes nothing of
what is computed in it.

DeepSpeed looks its neighbours up in a grid that all engines of a process share (``p2p._grid``), and remembers what it
has once told and been told over a link: a sender that it has announced its shapes, a receiver the buffers that it made
by them. A worker that has changed has neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.mesh import Worker, changed_links, columns_of


class _Column:
    """Stands in for DeepSpeed's grid, with the ranks of the column that this worker serves.

    Args:
        grid: the engine's own, for everything else.
        ranks: of the column's workers, stage by stage.
    """

    def __init__(self, grid: Any, ranks: Sequence[int]) -> None:
        self._grid, self._ranks = grid, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def stage_to_global(self, stage_id: int) -> int:
        return self._ranks[stage_id]


@contextmanager
def neighbours(engine: PipelineEngine, ranks: Sequence[int]) -> Iterator[None]:
    """While inside, the engine's messages go to and come from these ranks, one a stage."""
    before = p2p._grid
    p2p._grid = _Column(engine.grid, ranks)
    try:
        yield
    finally:
        p2p._grid = before


def column_ranks(wiring: np.ndarray, ranks: np.ndarray, worker: Worker) -> list[int]:
    """The ranks, stage by stage, of the column that a worker serves.

    Args:
        wiring: int64 [S, C].
        ranks: int [S, R], the global rank of each worker.
        worker: one of them.
    """
    ranks_S = np.take_along_axis(ranks, wiring, axis=1)[:, columns_of(wiring)[worker]]
    return list(map(int, ranks_S))


def reopen_links(engine: PipelineEngine, before: np.ndarray, wiring: np.ndarray, worker: Worker) -> None:
    """Between two schedules, forget what was agreed on over links of which an end is another, on both sides alike.

    Both move to a column of other shapes where a link's two workers move together, so that is another link too.

    Args:
        engine: of this worker.
        before, wiring: int64 [S, C], whom messages went by and whom they go by from now on.
        worker: this one.
    """
    changed_L = changed_links(before, wiring)[:, columns_of(wiring)[worker]]
    behind = worker.stage  # the link to the next stage
    if behind < len(changed_L) and changed_L[behind]:
        engine.first_output_send, engine.grad_layer = True, None
    if behind > 0 and changed_L[behind - 1]:
        engine.pipe_recv_buf = None
