"""What clean traffic did lately: samples of recent steps, one row per boundary and statistic, and their quantiles.

Quantiles cost a sort of all samples, so once a row holds enough steps only a share of the links is sorted anew after
each step, in turn. A row that was not available before is young whenever it comes: a part of a message that only some
batches have, say.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence import exact
from deepspeed_sentinel.judgement.robust import Ordered

SAMPLES = 2048
_TURNS = 8


class Window:
    """Sliding window over steps.

    Args:
        rows: (statistics, 2 directions, links).
        steps: how many are remembered.
        probabilities: whose quantiles are wanted.
        seed: of the choice which samples are kept of a step that has more than the window can hold.

    Attributes:
        learnt: steps learnt so far.
        quantiles: float64 [Q, *rows], NaN without samples.
        counts: int [*rows], samples that these quantiles are of.
        steps_heard: int [*rows], steps that are remembered of a row.
    """

    def __init__(self, rows: tuple[int, int, int], steps: int, probabilities: tuple[float, ...], seed: int) -> None:
        self._rows, self._steps, self._probabilities, self._seed = rows, steps, probabilities, seed
        self._samples = np.full((*rows, steps, 0), np.nan)
        self.learnt = 0
        self.quantiles = np.full((len(probabilities), *rows), np.nan)
        self.counts = np.zeros(rows, np.int64)
        self._heard = np.zeros((*rows, steps), bool)

    @property
    def steps_heard(self) -> np.ndarray:
        return exact.count(self._heard)

    def learn(self, values: np.ndarray, step: int, chosen: np.ndarray | None = None) -> tuple[list[int], Ordered]:
        """Remember a step's samples, float64 [*rows, N], NaN where there is none.

        Args:
            values: the samples.
            step: the engine's global step.
            chosen: bool [2, links, N], which of them there are; None is all.

        Returns:
            the links whose quantiles are new, and all that is remembered of them, [K, 2, len(links), N].
        """
        keep = max(1, min(values.shape[-1], SAMPLES // self._steps))
        if keep < values.shape[-1]:
            kept = np.random.default_rng((self._seed, step)).permutation(values.shape[-1])[:keep]
            values, chosen = values[..., kept], None if chosen is None else chosen[..., kept]
        if chosen is not None and not chosen.all():
            values = np.where(chosen, values, np.nan)
        if keep > self._samples.shape[-1]:
            grown = np.full((*self._rows, self._steps, keep), np.nan)
            grown[..., : self._samples.shape[-1]] = self._samples
            self._samples = grown
        # A row of which nothing is heard for long keeps what is known of it.
        heard = ~np.isnan(values).all(-1)
        slot = self.learnt % self._steps
        now = self._samples[..., slot, :]
        now[..., :keep] = np.where(heard[..., None], values, now[..., :keep])
        now[heard, keep:] = np.nan
        self._heard[..., slot] |= heard
        self.learnt += 1
        young = (heard & (self.steps_heard <= self._steps // 2)).any(axis=(0, 1))
        links = [link for link in range(self._rows[2]) if young[link] or (link + self.learnt) % _TURNS == 0]
        filled = min(self.learnt, self._steps)
        remembered = np.empty((*self._rows[:2], len(links), filled * self._samples.shape[-1]))
        for place, link in enumerate(links):
            remembered[:, :, place] = self._samples[:, :, link, :filled].reshape(*self._rows[:2], -1)
        ordered = Ordered.of(remembered)
        if links:
            self.quantiles[..., links] = ordered.quantiles(self._probabilities)
            self.counts[..., links] = ordered.count
        return links, ordered

    def samples(self, links: list[int]) -> np.ndarray:
        """What is remembered of some links, float64 [K, 2, len(links), steps, N]; a step's as they were given if they
        fit into the window."""
        return self._samples[:, :, links]

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "samples": self._samples.copy(),
            "learnt": np.array(self.learnt),
            "quantiles": self.quantiles.copy(),
            "counts": self.counts.copy(),
            "heard": self._heard.copy(),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._samples = np.array(state["samples"])
        self.learnt = int(state["learnt"])
        self.quantiles = np.array(state["quantiles"])
        self.counts = np.array(state["counts"])
        self._heard = np.array(state["heard"])
