"""Neighbours of a stage that have nothing to say about it, where they used to.

Statistics of a pair need that as many tokens left a stage as entered it, by the count that each neighbour gives. A
neighbour that gives another one takes the stage between out of sight. But whether a stage changes the number of tokens
is a matter of the model: where every message of the warm-up had statistics of its pair, later ones have them too. Where
one has none, the two neighbours are in dispute, as when they report different numbers.

Which of the two gave another number nobody else can tell. So the model has turned only where more workers of *each* of
the two stages have nothing to say than bad ones of both together could have brought about, and the turn is taken back
after ``AGAIN`` steps in a row in which that many have something to say in all messages.

Example: stage 2 of five, three replicas. One bad worker each of stages 1 and 3 silence two columns: a dispute in both.
Beside stage 1, whose other neighbour is the trusted stage 0, two silent columns of three are a turn of the model.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence.table import Rows
from deepspeed_sentinel.judgement.passing import entering, leaving
from deepspeed_sentinel.judgement.replicas import of_replicas
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh

AGAIN = 20


class Silence:
    """Which stages have statistics of their pairs, per direction and part.

    What so many columns of a stage have no longer is a turn of the model, and no dispute. With a single column there is
    no majority, so there a missing statistic always counts.

    Args:
        mesh: the mesh judged.
        parts: judged parts of a message.
    """

    def __init__(self, mesh: Mesh, parts: int) -> None:
        self._mesh = mesh
        self._heard = np.ones((2, max(mesh.stages - 2, 0), parts), bool)
        self._turned = np.zeros_like(self._heard)
        self._again = np.zeros(self._heard.shape, np.int64)  # steps in a row
        middle = np.arange(1, mesh.stages - 1)
        trusted = (middle == 1) * 1 + (middle == mesh.stages - 2) * 1  # of the two neighbours
        bad = (2 - trusted) * ((mesh.replicas - 1) // 2)
        self._most = np.maximum(bad, mesh.replicas // 2)[:, None]  # [S - 2, 1]: more than so many

    def step(self, statistics: np.ndarray, void: np.ndarray, served: np.ndarray, warming_up: bool) -> np.ndarray:
        """Look at a step.

        Args:
            statistics: [P * K, 2, L, C, M], as receivers report them.
            void: bool [L, C, M], gradients that carry nothing.
            served: int [S, C], who served each column.
            warming_up: what is missing is learnt, not held against anybody.

        Returns:
            bool [2, L, C, M]: messages about whose sender the neighbours should have something to say and have not.
        """
        contested = np.zeros(statistics.shape[1:], bool)
        if self._mesh.stages < 3:
            return contested
        unheard = np.isnan(statistics[Rows.all_of("transfer_cosine")])
        if not (unheard[:, FORWARD, 1:].any() or unheard[:, BACKWARD, :-1].any() or self._turned.any()):
            self._again = np.zeros_like(self._again)
            return contested
        usable = ~np.isnan(statistics[Rows.all_of("energy")])
        usable &= statistics[Rows.all_of("non_finite")] == 0
        usable &= statistics[Rows.all_of("max_abs")] > 0
        usable[:, BACKWARD] &= ~void
        # [2, S - 2, C, M, P]
        usable, unheard = (np.moveaxis(rows, 0, -1) for rows in (usable, unheard))
        asked = entering(usable) & leaving(usable)
        missing = asked & leaving(unheard)
        if warming_up:
            self._heard &= ~missing.any(axis=(2, 3))
            return contested
        missing &= self._heard[:, :, None, None]
        if not (missing.any() or self._turned.any()):
            self._again = np.zeros_like(self._again)
            return contested
        turned = self._by_most(missing.any(3), served) & (self._mesh.replicas > 1)
        speak = self._by_most(asked.any(3) & ~missing.any(3), served)
        self._turned = turned | (self._turned & (self._again < AGAIN))
        self._again = np.where(self._turned & speak, self._again + 1, 0)
        silent = (missing & ~self._turned[:, :, None, None]).any(-1)
        contested[FORWARD, 1:], contested[BACKWARD, :-1] = silent[FORWARD], silent[BACKWARD]
        return contested

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"heard": self._heard.copy(), "turned": self._turned.copy(), "again": self._again.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._heard, self._turned = np.array(state["heard"]), np.array(state["turned"])
        self._again = np.array(state["again"])

    def _by_most(self, columns: np.ndarray, served: np.ndarray) -> np.ndarray:
        """Where these columns (bool [2, S - 2, C, P]) are of enough workers of both neighbours, bool [2, S - 2, P]."""
        by_column = np.moveaxis(columns, -1, 1)
        counts = [
            np.count_nonzero(of_replicas(by_column, stage, self._mesh.replicas), axis=-1)
            for stage in (served[:-2], served[2:])
        ]
        return np.moveaxis(np.minimum(*counts), 1, -1) > self._most
