"""When the lasting projection of a pair gives way to the next one, without a step in which nothing is foretold.

All ranks count alike, because a verdict says the same to all about which messages were clean, so nobody talks about it.
When a projection is renewed is no secret; what it is, is. It is due after PERIOD steps, by an offset that is the pair's
own in each direction, so that not all renew theirs at once. In the last steps before that the next one is sketched and
learnt beside it, and takes over as soon as it has LEAD clean steps behind it.

What is not clean is not learnt from, while its stages go on changing: after a few steps what is known of them is out
of date and would accuse honest work. After STALE such steps in a row the pair starts anew with another
projection, and until READY clean steps are learnt its statistics that need memory are not available. Those without
memory are not touched by it.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.mesh import Mesh

PERIOD = 256
LEAD = 24
READY = 4
# In young simulated models ("tiny", 20 to 70 steps old) a map that missed 4 steps was off by 2 to 4 inter-quartile
# ranges of what is usual, after 8 steps by 3 to 9.
STALE = 3
_SPREAD = 103  # shares no factor with PERIOD - 2 LEAD


class Renewal:
    """Counts the steps of pairs X: of a whole mesh, [2, S, C] by direction, the stage between and the column.

    Attributes:
        epoch_X: int, how many lasting projections came before the present one.
        new_X: bool, whether the present one is in its first step.

    Args:
        offset_X: int, from 0, by which the first renewal comes sooner.
    """

    def __init__(self, offset_X: np.ndarray | int) -> None:
        self.epoch_X = np.zeros_like(np.asarray(offset_X))
        self.new_X = np.zeros_like(self.epoch_X, bool)
        # The first projection is learnt before another one is.
        self._age_X = np.asarray(offset_X) % (PERIOD - 2 * LEAD)
        self._learnt_X, self._next_X, self._missed_X = (np.zeros_like(self.epoch_X) for _ in range(3))

    @classmethod
    def of(cls, mesh: Mesh) -> Renewal:
        """Of all pairs of a mesh, spread over the period."""
        pairs_2SC = np.arange(2 * mesh.stages * mesh.replicas).reshape(2, mesh.stages, mesh.replicas)
        return cls(pairs_2SC * _SPREAD)

    @property
    def ready_X(self) -> np.ndarray:
        """bool, whether enough was learnt in the lasting projection to measure against it."""
        return self._learnt_X >= READY

    @property
    def overlapping_X(self) -> np.ndarray:
        """bool, whether the next projection, of epoch ``epoch_X + 1``, is sketched too."""
        return self._age_X >= PERIOD - LEAD

    def learn(self, clean_X: np.ndarray | bool) -> tuple[np.ndarray, np.ndarray]:
        """End a step.

        Args:
            clean_X: bool, which pairs learnt from it (``of_senders`` of a mesh's).

        Returns:
            bool, the pairs for which the next projection takes over, with what was learnt in it; and bool, those that
            start anew, with nothing. Both are so from the next step on.
        """
        clean_X = np.broadcast_to(clean_X, self.epoch_X.shape)
        overlapping_X = self.overlapping_X
        self._age_X = self._age_X + 1
        self._learnt_X = self._learnt_X + clean_X
        self._next_X = self._next_X + (clean_X & overlapping_X)
        self._missed_X = np.where(clean_X, 0, self._missed_X + 1)
        renewed_X, stale_X = self._next_X >= LEAD, self._missed_X >= STALE
        self._restart(renewed_X, self._next_X)
        self._restart(stale_X, np.zeros_like(self._next_X))
        self.new_X = renewed_X | stale_X
        return renewed_X, stale_X

    def forget(self, chosen_X: np.ndarray | bool = True) -> None:
        """Start pairs anew, each with another projection, between two steps; by default all."""
        chosen_X = np.broadcast_to(chosen_X, self.epoch_X.shape)
        self.new_X = self.new_X | chosen_X
        self._restart(chosen_X, np.zeros_like(self._next_X))

    def _restart(self, chosen_X: np.ndarray, learnt_X: np.ndarray) -> None:
        self.epoch_X = self.epoch_X + chosen_X
        self._learnt_X = np.where(chosen_X, learnt_X, self._learnt_X)
        self._age_X, self._next_X, self._missed_X = (
            np.where(chosen_X, 0, count_X) for count_X in (self._age_X, self._next_X, self._missed_X)
        )


def of_senders(clean_2LC: np.ndarray) -> np.ndarray:
    """From messages over links, bool [2, L, C], to the stages that sent them, [2, S, C]; False where one sends none."""
    none_1C = np.zeros_like(clean_2LC[0, :1])
    return np.stack([np.concatenate([clean_2LC[0], none_1C]), np.concatenate([none_1C, clean_2LC[1]])])
