"""Micro-batches without a gradient: all labels ignored, so the last stage sends exact zeros.

Such a message carries nothing to judge, and honest stages make exact zeros of it. So nothing that a micro-batch sends
backward is judged by its statistics then, and a stage that makes something of nothing is in alarm, unless it is one
that adds a gradient of its own (the loss that balances a router, say). Zeros that do not come from the last stage are
judged as any other message.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence.table import Rows
from deepspeed_sentinel.mesh import BACKWARD, Mesh


class Nothing:
    """Which messages carry nothing, and which stages may make something of it.

    Args:
        mesh: the mesh judged.
    """

    def __init__(self, mesh: Mesh) -> None:
        middle = max(mesh.stages - 2, 0)
        self._adds = np.zeros(middle, bool)
        self._keeps = np.zeros(middle, bool)

    def step(self, statistics: np.ndarray, warming_up: bool) -> tuple[np.ndarray, np.ndarray]:
        """Look at a step.

        A stage may add where it did so in the warm-up, or where most of its columns that were given nothing do:
        two at least, or one if it was never seen to leave zeros as they are.

        Args:
            statistics: [2 ends, 2, L, C, M, P * K], as reported.
            warming_up: what is made of nothing is learnt, not held against anybody.

        Returns:
            bool [L, C, M] twice: gradients that carry nothing, or are made of what does; and those that were made of
            nothing by a stage that should not.
        """
        zero = np.asarray(_zero(statistics[:, BACKWARD]).all(0))
        void = np.broadcast_to(zero[-1:], zero.shape)
        made = np.zeros_like(zero)
        if not zero[-1].any():
            return void, made
        given = zero[1:] & void[1:]
        made[:-1] = given & ~zero[:-1]
        makes, given_any = made[:-1].any(-1), given.any(-1)
        if warming_up:
            self._adds = self._adds | makes.any(-1)
        columns, of_columns = np.count_nonzero(makes, axis=-1), np.count_nonzero(given_any, axis=-1)
        self._adds = self._adds | ((2 * columns > of_columns) & ((columns >= 2) | ~self._keeps))
        self._keeps = self._keeps | (given_any & ~makes).any(-1)
        made[:-1] &= ~self._adds[:, None, None]
        return void, made

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"adds": self._adds.copy(), "keeps": self._keeps.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._adds, self._keeps = np.array(state["adds"]), np.array(state["keeps"])


def _zero(statistics: np.ndarray) -> np.ndarray:
    """Messages [...] of rows [..., P * K] all of whose parts are exactly zero."""
    largest = np.fmax.reduce(statistics[..., Rows.all_of("max_abs")], axis=-1)
    broken = np.fmax.reduce(statistics[..., Rows.all_of("non_finite")], axis=-1)
    return np.asarray((largest == 0) & (broken == 0))
