"""The messages of one step held against the fences: residuals and scores, link by link.

Where nothing lies beyond a fence, the largest score of a message is all that is asked for, and scores by statistic are
made only if somebody wants them. Where something does, the whole step is looked at more closely: who sends what the
others send stands out nowhere, and where all differ more than they used to, the fences are wider (see ``fences.py``).

``cascade.py`` says which messages set the centres, anew as often as that changes; only links for which it did are
worked out again. Axes are [statistic, link, column, micro-batch], where the links of both directions stand in a row.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.judgement.centre import more_than, of_samples
from deepspeed_sentinel.judgement.fences import Fences
from deepspeed_sentinel.judgement.pieces import in_a_row, pieces
from deepspeed_sentinel.judgement.robust import median, shortest_interval

# A statistic that was never there before is held against this step alone: an interval that holds half of it, times
# ROUGHLY, and at least GROSS, in the unit compared. Of a logarithm that is a factor of a thousand.
ROUGHLY, GROSS = 30.0, 7.0


class Held:
    """A step's messages and what the fences say of them.

    Args:
        fences: of all links.
        compared: float64 [K, 2, L, C, M], statistics in the units that fences compare.
        surely: bool [hard rows, 2, L, C, M], alarms that need no fence.
        hard: bool [K], rows without a fence.
        room: float64 [C], by how much the fences of a column are wider.
        convicted: bool [2, L, C], messages of convicted workers.
        warming_up: there are no fences yet.

    Attributes:
        residuals: float64 [K, 2, L, C, M].
        largest: float64 [2, L, C, M], the largest score of each message: 0 between the quartiles or where nothing is
            available, 1 on the fence, infinite where it is an alarm without one.
    """

    def __init__(
        self,
        fences: Fences,
        compared: np.ndarray,
        surely: np.ndarray,
        hard: np.ndarray,
        room: np.ndarray,
        convicted: np.ndarray,
        warming_up: bool,
    ) -> None:
        self._fences, self._replicas = fences, fences.mesh.replicas
        self._surely, self._hard, self._room, self._warming_up = surely, np.flatnonzero(hard), room, warming_up
        self._whole, self._compared = compared, in_a_row(compared)
        self.residuals = np.empty_like(compared)
        self._residuals = in_a_row(self.residuals)
        rows, links, *_ = self._compared.shape
        self._own = np.zeros((rows, links), bool)
        self._eligible, self._believed = np.zeros(self._compared.shape[1:], bool), np.zeros(links, bool)
        self._outside, self._looked_at = np.zeros(links, bool), False
        self._largest = np.zeros(self._compared.shape[1:])
        self._scores: np.ndarray | None = None
        self.largest = self._largest
        fences.begin(convicted)

    def measure(self, eligible: np.ndarray, doubtful: np.ndarray) -> None:
        """Work out residuals and scores.

        Args:
            eligible: bool [2, L, C, M], messages that may set the centre.
            doubtful: bool [2, L], links where they are not to be believed in this step.
        """
        believed = in_a_row(self._fences.centre.certain(eligible) & ~doubtful, 0)
        eligible = in_a_row(eligible, 0)
        stale = np.ones_like(believed)
        if self._looked_at:
            stale = (eligible != self._eligible).any(axis=(1, 2)) | (believed != self._believed)
        self._eligible, self._believed = eligible, believed
        was_outside = self._outside.any()
        for links in self._pieces(stale):
            self._take_residuals(links)
            if not self._warming_up:
                self._take_first_look(links)
        self._looked_at = True
        if self._outside.any():
            self._look_closely(stale if was_outside else np.ones_like(stale))
        elif was_outside:
            self._scores = None
            for links in self._pieces(~stale):
                self._take_first_look(links)
        assert not np.isnan(self._largest.max()), "a score that is no number would be no alarm"
        largest, surely = self._largest.reshape(self._whole.shape[1:]), self._surely.any(0)
        self.largest = np.where(surely, np.inf, largest) if surely.any() else largest

    @property
    def per_statistic(self) -> np.ndarray:
        """float64 [K, 2, L, C, M], scores by statistic."""
        if self._scores is None:
            self._scores = np.zeros_like(self._compared)
            if not self._warming_up:
                for links in pieces(self._compared):
                    self._scores[:, links] = self._first_scores(links)
        scores = self._scores.reshape(self._whole.shape)
        scores[self._hard] = np.where(self._surely, np.inf, 0.0)
        return scores

    def _pieces(self, wanted: np.ndarray) -> list[slice]:
        return [links for links in pieces(self._compared) if wanted[links].any()]

    def _take_residuals(self, links: slice) -> None:
        level = in_a_row(self._fences.usual.level)[:, links, :, None]
        aligned = np.subtract(self._compared[:, links], level, out=self._residuals[:, links])
        centre, self._own[:, links] = self._fences.centre.of(
            links, aligned, self._eligible[links], self._believed[links]
        )
        aligned -= centre[..., None, None]

    def _first_scores(self, links: slice) -> np.ndarray:
        """float64 [K, N, C, M], before anything is looked at more closely."""
        scores = self._fences.beyond(links, self._residuals[:, links])
        if self._fences.has_majority:
            self._hold_against_this_step(links, scores)
        return scores

    def _take_first_look(self, links: slice) -> None:
        scores = self._first_scores(links)
        # A hard row that nothing is known of counts here too: where there is one, the step is not like others.
        outside = (scores[self._hard] > 1.0).any(axis=(0, 2, 3))
        self._enter(links, scores)
        self._outside[links] = outside | (self._largest[links] > 1.0).any(axis=(1, 2))

    def _enter(self, links: slice, scores: np.ndarray) -> None:
        scores[self._hard] = 0.0
        self._largest[links] = np.maximum.reduce(scores, axis=0)

    def _look_closely(self, wanted: np.ndarray) -> None:
        if self._scores is None:
            self._scores = np.empty_like(self._compared)
        alone = None
        if self._fences.compares_replicas and not self._fences.has_majority:
            eligible = self._eligible.reshape(self._whole.shape[1:])
            alone = in_a_row(self._fences.past.moved_alone(self._whole, eligible))
        for links in self._pieces(wanted):
            compared, eligible, own = self._compared[:, links], self._eligible[links], self._own[:, links]
            scores = self._first_scores(links)
            # Who sends what the others send stands out nowhere, whatever it used to send.
            among_others = compared - of_samples(median, compared, eligible)[..., None, None]
            closer = np.minimum(scores, self._fences.beyond(links, among_others))
            scores = np.where((own & self._fences.known(links))[..., None, None], closer, scores)
            if self._fences.has_majority:
                scores /= self._widening(links)[..., None, None]
            elif alone is not None:
                scores = np.where(alone[:, links, :, None], scores, 0.0)
            scores /= self._room[:, None]
            self._enter(links, scores)
            self._scores[:, links] = scores

    def _widening(self, links: slice) -> np.ndarray:
        """By how much the fences of a step are wider, float64 [K, N], where all differ more than they used to."""
        eligible, usual = self._eligible[links], self._fences.range_of(links)
        spread = of_samples(_third, self._residuals[:, links], eligible)
        # of NaN it is none
        wider = self._own[:, links] & more_than(2, 3, eligible, self._replicas) & (spread > usual)
        return np.where(wider, spread / np.where(wider, usual, 1.0), 1.0)

    def _hold_against_this_step(self, links: slice, scores: np.ndarray) -> None:
        """Score, in place, what has no fence yet."""
        new = ~self._fences.known(links) & self._own[:, links]
        if not new.any():
            return
        residuals = self._residuals[:, links]
        new[new] = ~np.isnan(residuals[new]).all(axis=(-2, -1))
        if new.any():
            half = of_samples(_half, residuals, self._eligible[links])[new]
            limit = np.fmax(ROUGHLY * half, GROSS)[:, None, None]
            scores[new] = np.fmax(np.abs(residuals[new]) / limit, 0.0)


def _half(values: np.ndarray) -> np.ndarray:
    return shortest_interval(values, 0.5)


def _third(values: np.ndarray) -> np.ndarray:
    return shortest_interval(values, 1.0 / 3.0)
