"""Two replicas: where they differ more than they used to, the one that left its own past has changed.

There is no majority, so the residuals of both stand out alike. If both have moved, training did: another kind of data,
a jump of the learning rate, a spike of the loss. It counts against a replica only where it moved alone,

    |m - past| of its own  >  ALONE times  |m - past| of the other's       m: a column's median of the statistic

and where only one of the two can be heard at all, against nobody.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.judgement.robust import median

ALONE = 2.0
_RATE = 0.3


class Past:
    """What each column's messages were of late.

    Args:
        shape: (K, 2, L, C).
    """

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self._level = np.full(shape, np.nan)

    def moved_alone(self, comparable: np.ndarray, eligible: np.ndarray) -> np.ndarray:
        """bool [K, 2, L, C]: columns that left their past while the other one did not.

        Args:
            comparable: float64 [K, 2, L, 2, M].
            eligible: bool [2, L, 2, M].
        """
        moved = np.abs(median(np.where(eligible, comparable, np.nan)) - self._level)
        with np.errstate(invalid="ignore"):
            return np.asarray(moved > ALONE * moved[..., ::-1])

    def learn(self, comparable: np.ndarray, clean: np.ndarray) -> None:
        """Follow the clean messages, bool [2, L, C, M]."""
        now = median(np.where(clean, comparable, np.nan))
        followed = np.where(np.isnan(self._level), now, self._level + _RATE * (now - self._level))
        self._level = np.where(np.isnan(now), self._level, followed)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"level": self._level.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._level = np.array(state["level"])
