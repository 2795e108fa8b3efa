"""What is usual of a column: how far its messages lie, for good, from those of the other replicas.

Honest replicas hold the same weights, so what lasts between them comes of their data, and data belong to a column. Of
each column, link, direction and statistic the usual residual is kept,

    level <- level + rate clip(r, -limit, limit)        r: the step's mean residual of what was clean, level taken off

with a rate so low and a limit so close that who drifts slowly walks no faster than ``RATE`` fences a step. Where a
change of content is known to be honest (``content.py``) it is followed at once.

Arrays follow the axes [statistic, direction, link, column].
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.judgement.pieces import sums

RATE = 0.03
FOLLOWED = 0.3  # where the change is explained
FARTHEST = 1e39  # what float32 numbers can lie apart
_FIRST_STEPS = 0.1  # training's beginning, in which all that is usual still changes


class Usual:
    """Usual residuals.

    Args:
        shape: (K, 2, L, C).

    Attributes:
        level: float64 [K, 2, L, C], 0 where nothing is known.
    """

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.level = np.zeros(shape)
        self._seen = np.zeros(shape, np.int64)

    def learn(
        self,
        residuals: np.ndarray,
        chosen: np.ndarray,
        within: np.ndarray,
        explained: np.ndarray,
        limit: np.ndarray,
    ) -> None:
        """Move towards a step's residuals.

        Args:
            residuals: float64 [K, 2, L, C, M], NaN where not available.
            chosen: bool [2, L, C, M] or [K, 2, L, C, M], which messages to learn from.
            within: bool [K, 2, L, C], in which columns.
            explained: bool [C], columns in which the change is followed at once.
            limit: float64 [K, 2, L], how far off a step may be where it is not; NaN is any distance.
        """
        total, count = sums(residuals, chosen)
        count[~within] = 0
        mean = total / np.maximum(count, 1)
        # What a fault may have left does not stay for ever.
        lost = ~np.isfinite(self.level)
        if lost.any():
            self.level, self._seen = np.where(lost, 0.0, self.level), np.where(lost, 0, self._seen)
        unlimited, known = np.isnan(limit), count > 0
        bound = np.where(unlimited, np.inf, limit)[..., None]
        rate = np.maximum(1.0 / (self._seen + 1.0), np.where(unlimited, _FIRST_STEPS, RATE)[..., None])
        if explained.any():
            bound = np.where(explained, np.inf, bound)
            rate = np.where(explained, np.maximum(rate, FOLLOWED), rate)
        self.level = np.where(known, self.level + rate * mean.clip(-bound, bound), self.level)
        self._seen = self._seen + known

    def adopt(self, links: np.ndarray, residuals: np.ndarray) -> None:
        """Take what stood out of some columns for what is usual of them.

        Args:
            links: bool [2, L, C].
            residuals: float64 [K, 2, L, C], the level taken off; NaN changes nothing.
        """
        moved = np.clip(self.level + residuals, -FARTHEST, FARTHEST)
        self.level = np.where(links & ~np.isnan(residuals), moved, self.level)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"level": self.level.copy(), "seen": self._seen.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.level, self._seen = np.array(state["level"]), np.array(state["seen"])
