"""Two replicas: where they differ more than they used to, the one that left its own past has changed.

There is no majority, so the residuals of both stand out alike. If both have moved, training did: another kind of data,
a jump of the learning rate, a spike of the loss. It counts against a replica only where it moved alone,

    max |x - past| of its own  >  ALONE times  max |x - past| of the other's       x: the statistic of a message

and where only one of the two can be heard at all, against nobody. The largest of a step and not its median, which who
tampers with the lesser part of its messages does not move: it would be found now and then, and more often the honest
stage behind it that makes more of the same.
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
        away = np.abs(comparable - self._level[..., None])
        moved = np.fmax.reduce(np.where(eligible, away, np.nan), axis=-1)
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
