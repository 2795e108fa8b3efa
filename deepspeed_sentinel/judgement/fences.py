"""Fences: bounds from the inter-quartile range of recent clean residuals, one pair per boundary and statistic.

A residual is a statistic minus the median over all replicas' messages of that link and direction in that step.
With fewer than three replicas there is no majority in a step, so it is minus the running median of recent steps.

    score = distance beyond the nearer quartile / (k * IQR)            1 = on the fence
    k     = max(multiplier, margin * the clean score that the target rate of false alarms allows)

Tukey's fences (1977) with the multiplier k learnt from the tail of clean traffic, as arXiv 2603.03592 adapts its
thresholds to a false-positive rate.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence.table import FLOORS, HARD
from deepspeed_sentinel.judgement.robust import quantiles
from deepspeed_sentinel.mesh import Mesh

# Clean scores are heavy-tailed: in our measurements the largest of 1,000 lay 1.6 times above their 99.5th percentile.
# A false alarm costs a column's step, and with it bit-identity to an unwatched run, so the fences stand further out.
MARGIN = 2.0
# Messages of one step share the drift of training, so the tail is known only as well as the number of steps allows:
# after n steps the margin is widened by 1 + STEP_DOUBT / sqrt(n).
STEP_DOUBT = 1.0
_SAMPLES = 2048
_MAJORITY = 3


class Fences:
    """Sliding window of clean residuals and the bounds that follow from it.

    Args:
        mesh: the mesh judged.
        window: steps remembered.
        multiplier: smallest k.
        target_rate: share of clean messages that may be alarms, over all statistics together.
        seed: of the choice which residuals are remembered when a step has more than the window can hold.
    """

    def __init__(self, mesh: Mesh, window: int, multiplier: float, target_rate: float, seed: int) -> None:
        self.mesh = mesh
        self.window = window
        self.multiplier = multiplier
        self.seed = seed
        self._rate = target_rate / np.count_nonzero(~HARD)
        self._rows = (2, mesh.links, len(HARD))
        self.learnt_steps = 0
        self._residuals = np.full((*self._rows, window, 0), np.nan)
        self._centres = np.full((*self._rows, window), np.nan)
        self._bounds()

    @property
    def compares_replicas(self) -> bool:
        return self.mesh.replicas >= _MAJORITY

    def residuals(self, comparable: np.ndarray, eligible: np.ndarray) -> np.ndarray:
        """Statistics [2, L, C, M, K] in comparable units minus their centre.

        Args:
            comparable: float64 [2, L, C, M, K].
            eligible: bool [2, L, C, M], messages that may set the centre.
        """
        current = self._centre_of(comparable, eligible)
        if self.compares_replicas or self.learnt_steps == 0:
            centre = current
        else:
            (centre,) = quantiles(self._centres, (0.5,))
            centre = np.where(np.isnan(centre), current, centre)
        return comparable - centre[:, :, None, None, :]

    def scores(self, residuals: np.ndarray) -> np.ndarray:
        """Residuals [2, L, C, M, K] to scores: 0 between the quartiles, 1 on the fence, NaN if not available."""
        low, high, reach = (a[:, :, None, None, :] for a in (self.quartile_low, self.quartile_high, self.reach))
        return np.maximum(np.maximum(low - residuals, residuals - high), 0.0) / reach

    def bounds(self, direction: int, link: int, statistic: int) -> tuple[float, float]:
        """Lower and upper fence of a residual."""
        row = (direction, link, statistic)
        return float(self.quartile_low[row] - self.reach[row]), float(self.quartile_high[row] + self.reach[row])

    def learn(self, comparable: np.ndarray, residuals: np.ndarray, clean: np.ndarray, step: int) -> None:
        """Remember the residuals of clean messages (bool [2, L, C, M]) and renew the bounds."""
        slot = self.learnt_steps % self.window
        chosen = np.where(clean[..., None], residuals, np.nan)
        chosen = np.moveaxis(chosen, -1, 2).reshape(*self._rows, -1)
        keep = max(1, min(chosen.shape[-1], _SAMPLES // self.window))
        if keep < chosen.shape[-1]:
            pick = np.random.default_rng((self.seed, step)).permutation(chosen.shape[-1])[:keep]
            chosen = chosen[..., pick]
        if keep != self._residuals.shape[-1]:
            grown = np.full((*self._rows, self.window, max(keep, self._residuals.shape[-1])), np.nan)
            grown[..., : self._residuals.shape[-1]] = self._residuals
            self._residuals = grown
        self._residuals[..., slot, :] = np.nan
        self._residuals[..., slot, :keep] = chosen
        self._centres[..., slot] = self._centre_of(comparable, clean)
        self.learnt_steps += 1
        self._bounds()

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "residuals": self._residuals.copy(),
            "centres": self._centres.copy(),
            "learnt_steps": np.array(self.learnt_steps),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._residuals = np.array(state["residuals"])
        self._centres = np.array(state["centres"])
        self.learnt_steps = int(state["learnt_steps"])
        self._bounds()

    def _centre_of(self, comparable: np.ndarray, eligible: np.ndarray) -> np.ndarray:
        values = np.where(eligible[..., None], comparable, np.nan)
        return quantiles(np.moveaxis(values, -1, 2).reshape(*self._rows, -1), (0.5,))[0]

    def _bounds(self) -> None:
        samples = self._residuals.reshape(*self._rows, -1)
        if samples.shape[-1] == 0:
            self.quartile_low = self.quartile_high = np.full(self._rows, np.nan)
            self.iqr = self.reach = np.full(self._rows, np.nan)
            return
        self.quartile_low, self.quartile_high = quantiles(samples, (0.25, 0.75))
        self.iqr = np.maximum(self.quartile_high - self.quartile_low, FLOORS)
        beyond = np.maximum(self.quartile_low[..., None] - samples, samples - self.quartile_high[..., None])
        (tail,) = quantiles(np.maximum(beyond, 0.0) / self.iqr[..., None], (1.0 - self._rate,))
        seen = np.maximum(np.count_nonzero(~np.isnan(samples), axis=-1), 2)
        # With fewer samples than 1 / rate the tail is extended as if scores fell off exponentially.
        stretch = np.maximum(1.0, np.log(self._rate) / np.log(1.0 / seen))
        doubt = 1.0 + STEP_DOUBT / np.sqrt(min(self.learnt_steps, self.window))
        k = np.maximum(self.multiplier, MARGIN * doubt * stretch * tail)
        self.reach = k * self.iqr
