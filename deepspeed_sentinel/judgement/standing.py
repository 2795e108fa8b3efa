"""What stands out of a worker from its first strike on: if it is cleared, that is its own new normal.

A worker that a twin step has cleared does honest work. What stood out of it came of its data, and if that lasts, their
column would be left out again and again. So what it sent between is taken for usual of the column (``usual.py``) in
which it was struck last, wherever it serves when it is cleared, if that stood out in at least three steps and in three
quarters of all since the first: what is seen once tells nothing of what lasts. Who attacks in so many steps and keeps
still in the twin steps has to guess which these are.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence import exact
from deepspeed_sentinel.judgement.clean import sent_by
from deepspeed_sentinel.judgement.usual import FARTHEST

_LEAST_STEPS, _SHARE = 3, 0.75
_STATE = ("sums", "known", "steps", "out", "since", "who")


class Standing:
    """Mean residuals of those who are struck.

    Args:
        shape: (K, 2, L, C).
        window: steps without a strike after which all is forgotten.
    """

    def __init__(self, shape: tuple[int, int, int, int], window: int) -> None:
        self._window = window
        self._sums = np.zeros(shape)
        self._known = np.zeros(shape, np.int64)
        self._steps, self._out, self._since, self._who = (np.zeros(shape[1:], np.int64) for _ in range(4))

    def step(self, residuals: np.ndarray, striking: np.ndarray, served: np.ndarray) -> None:
        """Hear of a step that is no twin step.

        Args:
            residuals: float64 [K, 2, L, C, M].
            striking: bool [2, L, C], where a worker is struck for what it sent.
            served: int [S, C], who served each column.
        """
        if not (striking.any() or self._out.any()):
            self._since = self._since + 1
            return
        self._who = np.where(striking, sent_by(served), self._who)
        self._out = self._out + striking
        self._since = np.where(striking, 0, self._since + 1)
        followed = (self._out > 0) & (self._since < self._window)
        self._forget(~followed)
        if not followed.any():
            return
        self._steps = self._steps + followed
        known = ~np.isnan(residuals)
        count = exact.count(known)
        mean = exact.total(np.where(known, residuals, 0.0)) / np.maximum(count, 1)
        heard = followed & (count > 0)
        self._sums = np.where(heard, np.clip(self._sums + mean, -FARTHEST, FARTHEST), self._sums)
        self._known = self._known + heard

    def lasting(self, cleared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where what stood out of the cleared (bool [S, R]) lasts, bool [2, L, C], and its mean, float64 [K, 2, L, C].

        It is forgotten here.
        """
        struck = np.take_along_axis(sent_by(cleared), self._who, axis=-1)
        lasts = struck & (self._out >= _LEAST_STEPS) & (self._out >= _SHARE * self._steps)
        mean = np.where(self._known > 0, self._sums / np.maximum(self._known, 1), np.nan)
        self._forget(lasts)
        return lasts, mean

    def forget(self, workers: np.ndarray) -> None:
        """Nothing stood out of these, bool [S, R]: they are others than before."""
        self._forget(np.take_along_axis(sent_by(workers), self._who, axis=-1))

    def state_dict(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, f"_{name}").copy() for name in _STATE}

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of what a state may hold, by name."""
        return {"who": (0.0, self._who.shape[-1] - 1.0), "sums": (-FARTHEST, FARTHEST)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        for name in _STATE:
            setattr(self, f"_{name}", np.array(state[name]))

    def _forget(self, links: np.ndarray) -> None:
        self._sums = np.where(links, 0.0, self._sums)
        self._known = np.where(links, 0, self._known)
        self._steps, self._out = np.where(links, 0, self._steps), np.where(links, 0, self._out)
