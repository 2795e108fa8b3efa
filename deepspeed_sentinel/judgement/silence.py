"""Neighbours of a stage that have nothing to say about it, where they used to.

Statistics of a pair need that as many tokens left a stage as entered it, by the count that each neighbour gives. A
neighbour that gives another one takes the stage between out of sight. But whether a stage changes the number of tokens
is a matter of the model: where every message of the warm-up had statistics of its pair, later ones have them too. Where
one has none, the two neighbours are in dispute, as when they report different numbers.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence.table import Rows
from deepspeed_sentinel.judgement.passing import entering, leaving
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh


class Silence:
    """Which stages have statistics of their pairs, per direction and part.

    What most columns of a stage have no longer is a turn of the model, and no dispute. With a single column there is no
    majority, so there a missing statistic always counts.

    Args:
        mesh: the mesh judged.
        parts: judged parts of a message.
    """

    def __init__(self, mesh: Mesh, parts: int) -> None:
        self._mesh = mesh
        self._heard = np.ones((2, max(mesh.stages - 2, 0), parts), bool)

    def step(self, statistics: np.ndarray, void: np.ndarray, warming_up: bool) -> np.ndarray:
        """Look at a step.

        Args:
            statistics: [2, L, C, M, P * K], as receivers report them.
            void: bool [L, C, M], gradients that carry nothing.
            warming_up: what is missing is learnt, not held against anybody.

        Returns:
            bool [2, L, C, M]: messages about whose sender the neighbours should have something to say and have not.
        """
        contested = np.zeros(statistics.shape[:-1], bool)
        if self._mesh.stages < 3:
            return contested
        usable = ~np.isnan(statistics[..., Rows.all_of("energy")])
        usable &= (statistics[..., Rows.all_of("non_finite")] == 0) & (statistics[..., Rows.all_of("max_abs")] > 0)
        usable[BACKWARD] &= ~void[..., None]
        # [2, S - 2, C, M, P]
        missing = entering(usable) & leaving(usable & np.isnan(statistics[..., Rows.all_of("transfer_cosine")]))
        if warming_up:
            self._heard &= ~missing.any(axis=(2, 3))
            return contested
        missing &= self._heard[:, :, None, None]
        columns = np.count_nonzero(missing.any(3), axis=2)
        turned = (2 * columns > self._mesh.replicas) & (self._mesh.replicas > 1)
        self._heard &= ~turned
        silent = (missing & ~turned[:, :, None, None]).any(-1)
        contested[FORWARD, 1:], contested[BACKWARD, :-1] = silent[FORWARD], silent[BACKWARD]
        return contested

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"heard": self._heard.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._heard = np.array(state["heard"])
