"""What a replayed step shows: the same micro-batches computed twice by the same workers, before the optimizer steps.

A worker that makes something else of the same the second time miscalculates now and then, or its work is not the same
bit for bit by nature. The first replay of a run tells the two apart: what differs there is nature, and these stages are
not accused from then on. Where a message differs, all that follows it on its micro-batch's way differs for its sake:

* the sender of the first message that differs, by both its ends, is inconsistent; if one end alone says so, the column
  is left out, and nobody is;
* so is a worker whose accumulated gradients differ though nothing that entered its stage did.

Worked example, 3 stages, one column, one micro-batch; = is the same both times, x is not:

    forward   link 0 =   link 1 x    backward link 1 x   link 0 x    gradients stage 0 x, 1 x, 2 x

The first difference is what stage 1 sent forward: worker (1, 0) is inconsistent, and nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.judgement.blame import by_link, chain_order, followers
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker, columns_of


@dataclass(frozen=True)
class Replayed:
    """The outcome of a replay.

    Attributes:
        inconsistent: workers that made two things of the same.
        spoilt: bool [C], columns in which anything differs.
    """

    inconsistent: tuple[Worker, ...]
    spoilt: np.ndarray


class Replays:
    """Knows which stages are not the same twice by nature.

    Args:
        mesh: stages and replicas.

    Attributes:
        unlike: bool [S]; None before the first replay.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.unlike: np.ndarray | None = None

    def step(self, differ: np.ndarray, gradients: np.ndarray, served: np.ndarray) -> Replayed:
        """Judge one replay.

        Args:
            differ: bool [2 ends, 2, L, C, M], messages that an end reports to differ between the two times.
            gradients: bool [S, R], workers whose accumulated gradients do.
            served: int [S, C], who served each column.
        """
        mesh = self._mesh
        either = np.asarray(differ.any(0))
        first = either & ~followers(either)
        named = np.zeros((mesh.stages, mesh.replicas), bool)
        for direction, link, column, _ in np.argwhere(first & differ.all(0)).tolist():
            stage = mesh.sender_stage(direction, link)
            named[stage, served[stage, column]] = True
        entered = np.zeros((mesh.stages, mesh.replicas), bool)  # by column
        so_far = np.asarray(by_link(np.logical_or.accumulate(chain_order(either), axis=0)).any(-1))
        entered[1:] |= so_far[FORWARD]
        entered[:-1] |= so_far[BACKWARD]
        named |= gradients & ~np.take_along_axis(entered, columns_of(served), axis=1)
        if self.unlike is None:
            self.unlike = np.asarray(named.any(1))
        named &= ~self.unlike[:, None]
        spoilt = np.take_along_axis(named, served, axis=1).any(0) | (first & ~differ.all(0)).any(axis=(0, 1, 3))
        return Replayed(tuple(Worker(*place) for place in np.argwhere(named).tolist()), np.asarray(spoilt))
