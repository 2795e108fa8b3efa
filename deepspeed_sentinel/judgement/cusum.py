"""Weak but persistent tampering: a worker's small deviations, summed over micro-batches and steps.

    r  = mean over a worker's messages of a step of a residual, per direction and statistic
    u  = (r - the worker's own usual r) / spread of such differences among honest workers, clipped to +-CLIP
    C+ = max(0, C+ + u - SLACK),  C- = max(0, C- - u - SLACK)          score = max(C+, C-) / LIMIT

Page's cumulative sum test (1954). For independent normal u it crosses LIMIT by chance in one of exp(2 SLACK LIMIT)
steps. Each worker is compared with its own past, because honest ones differ lastingly too (in their data, say).
Clipping keeps a single outlier, which is the fences' matter, from filling the sum.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence.table import FLOORS, HARD
from deepspeed_sentinel.judgement.robust import quantiles
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh

SLACK, LIMIT, CLIP = 1.0, 10.0, 4.0
_HIGHEST = 1.5 * LIMIT  # so that a worker that stops tampering is heard of soon
_DECAY = 0.97
_MAD_TO_DEVIATION = 1.4826
_UNSUSPICIOUS = 0.5


class Cusum:
    """Sums per worker, for what it sends forward and backward.

    Args:
        mesh: the mesh judged.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        shape = (2, mesh.links, mesh.replicas, len(HARD))
        self._sums = np.zeros((2, *shape))
        self._usual = np.zeros(shape)
        self._weight = np.zeros(shape)
        self._spread = np.zeros(shape[:2] + shape[3:])
        self._spread_weight = np.zeros(self._spread.shape)

    def step(self, residuals: np.ndarray, counted: np.ndarray, served: np.ndarray, warming_up: bool) -> np.ndarray:
        """Add one step and score it.

        Args:
            residuals: float64 [2, L, C, M, K], NaN where not available.
            counted: bool [2, L, C, M], messages that say something about their sender: no cascade, no dispute.
            served: int [S, C], which replica served which column.
            warming_up: learn what is usual, accuse nobody.

        Returns:
            float64 [2, L, C, K]: the score of the worker that sent over that link in that column.
        """
        mean_LRK = self._by_worker(np.where(counted[..., None], residuals, np.nan), served)
        usual = self._usual / np.maximum(self._weight, 1e-12)
        difference = np.where(self._weight > 0, mean_LRK - usual, np.nan)
        spread = self._spread / np.maximum(self._spread_weight, 1e-12)
        if not warming_up:
            known = np.isfinite(difference) & (self._spread_weight > 0)[:, :, None]
            step = np.clip(np.nan_to_num(difference) / np.maximum(spread, FLOORS)[:, :, None], -CLIP, CLIP)
            grown = np.clip(self._sums + np.stack([step, -step]) - SLACK, 0.0, _HIGHEST)
            self._sums = np.where(known, grown, self._sums)
        scores = self._sums.max(0) / LIMIT
        self._learn(mean_LRK, difference, scores)
        return self._to_columns(scores, served)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, f"_{name}").copy() for name in _STATE}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        for name in _STATE:
            setattr(self, f"_{name}", np.array(state[name]))

    def _learn(self, mean: np.ndarray, difference: np.ndarray, scores: np.ndarray) -> None:
        sound = np.isfinite(mean) & (scores < _UNSUSPICIOUS)
        self._usual = np.where(sound, _DECAY * self._usual + (1 - _DECAY) * np.nan_to_num(mean), self._usual)
        self._weight = np.where(sound, _DECAY * self._weight + (1 - _DECAY), self._weight)
        away = np.where(sound, np.abs(difference), np.nan)
        (middle,) = quantiles(np.moveaxis(away, 2, -1), (0.5,))
        any_known = ~np.isnan(middle)
        middle = np.nan_to_num(middle)
        self._spread = np.where(
            any_known, _DECAY * self._spread + (1 - _DECAY) * _MAD_TO_DEVIATION * middle, self._spread
        )
        self._spread_weight = np.where(any_known, _DECAY * self._spread_weight + (1 - _DECAY), self._spread_weight)

    def _by_worker(self, values: np.ndarray, served: np.ndarray) -> np.ndarray:
        """[2, L, C, M, K] -> mean over each sender's messages, [2, L, R, K]; NaN where it sent none that counts."""
        known = ~np.isnan(values)
        sums, counts = np.where(known, values, 0.0).sum(3), known.sum(3)
        replicas = np.arange(self._mesh.replicas)
        result = np.empty((2, self._mesh.links, self._mesh.replicas, values.shape[-1]))
        for direction, senders in ((FORWARD, served[:-1]), (BACKWARD, served[1:])):
            # one-hot [L, R, C]: which columns a worker served
            serves = (senders[:, None, :] == replicas[:, None]).astype(float)
            with np.errstate(invalid="ignore", divide="ignore"):
                result[direction] = (serves @ sums[direction]) / (serves @ counts[direction])
        return result

    def _to_columns(self, scores: np.ndarray, served: np.ndarray) -> np.ndarray:
        senders = np.stack([served[:-1], served[1:]])
        return np.take_along_axis(scores, senders[..., None], axis=2)


_STATE = ("sums", "usual", "weight", "spread", "spread_weight")
