"""Fences: bounds from the inter-quartile range of recent clean residuals, one pair per boundary and statistic.

A residual is what is left of a statistic without what is usual of its column (``usual.py``) and without its centre:
the median of that over all replicas' messages of that link and direction in that step, or of recent steps.

    score = distance beyond the nearer quartile / (k * IQR * w * room)     1 = on the fence
    k     = max(multiplier, margin * the clean score that the target rate of false alarms allows)
    w     = max(1, shortest interval that holds a third of this step's residuals / IQR)
    room  = more than 1 where the column's content is new (``content.py``)

A message is as far out as the smaller of its distances from its column's usual and from what the other replicas send.

A step's own median is believed where those who tamper cannot be its side. Fewer than half of a stage do, so at most
n = floor((R - 1) / 2), and more than 2 n columns must be left to set it, of those that nothing spoilt before: with five
replicas all five, for two bad among three that are left are most of them. Otherwise, and always with one replica, the
centre is that of recent steps. Training may turn meanwhile. Where more than half of all columns lie beyond the same
fence around the recent centre, one of them at least is honest, so training did it, and the step's own median holds.

Tukey's fences (1977) with the multiplier k learnt from the tail of clean traffic, as arXiv 2603.03592 adapts its
thresholds to a false-positive rate. Training has turns after which honest replicas differ more than they used to. Half
of the honest residuals lie within an IQR, and they are a third of all even if a third of the workers are bad; where
they lie further apart, all differ more, and the fences are wider by as much (w, after the shorth of Tukey).

Arrays follow the axes [statistic, direction, link, column, micro-batch].
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence import exact
from deepspeed_sentinel.evidence.table import Rows
from deepspeed_sentinel.judgement.few import Past
from deepspeed_sentinel.judgement.robust import Ordered, median, shortest_interval
from deepspeed_sentinel.judgement.state import LARGEST
from deepspeed_sentinel.judgement.usual import FARTHEST, Usual
from deepspeed_sentinel.judgement.window import Window
from deepspeed_sentinel.mesh import Mesh

# Clean scores are heavy-tailed: in our measurements the largest of 1,000 lay 1.6 times above their 99.5th percentile.
# A false alarm costs a column's step, and with it bit-identity to an unwatched run, so the fences stand further out.
MARGIN = 2.0
# Messages of one step share the drift of training, so the tail is known only as well as the number of steps allows:
# after n steps the margin is widened by 1 + STEP_DOUBT / sqrt(n).
STEP_DOUBT = 2.0
# Whoever stays just inside a fence is learnt as its tail. Without a limit the fence would go out by MARGIN and more
# each time that it is renewed. In a full window it grows by no more than this at once, about twofold in 64 steps, and
# so does the range that it is a multiple of.
GROWTH = 1.1
# Where the recent centre stands in for long it has to follow training, but nobody may walk it through a fence soon.
FOLLOWED = 0.1
# A statistic that was never there before is held against this step alone: an interval that holds half of it, times
# ROUGHLY, and at least GROSS, in the unit compared. Of a logarithm that is a factor of a thousand.
ROUGHLY, GROSS = 30.0, 7.0
_MAJORITY = 3
_RECENT = 8
_ONE_PART = Rows(1)


class Fences:
    """Sliding window of clean residuals and the bounds that follow from it.

    Args:
        mesh: the mesh judged.
        window: steps remembered.
        multiplier: smallest k.
        target_rate: share of clean messages that may be alarms, over all statistics together.
        seed: of the choice which residuals are remembered when a step has more than the window can hold.
        table: the rows judged.
    """

    def __init__(
        self, mesh: Mesh, window: int, multiplier: float, target_rate: float, seed: int, table: Rows = _ONE_PART
    ) -> None:
        self.mesh = mesh
        self.window = window
        self.multiplier = multiplier
        self._rate = target_rate / np.count_nonzero(~table.hard)
        self._floors = table.floors[:, None, None]
        self._rows = (len(table), 2, mesh.links)
        self._residuals = Window(self._rows, window, (0.25, 0.75), seed)
        self._centres = np.full((*self._rows, window), np.nan)
        self.reach = np.full(self._rows, np.nan)
        self._range = np.full(self._rows, np.nan)  # the IQR, but in a full window it grows by GROWTH at most
        # of the last step's residuals, and where it is not that step's own
        self._centre, self._behind = np.full(self._rows, np.nan), np.zeros(self._rows, bool)
        self._turns = np.zeros(self._rows, bool)
        self._settled = np.full(self._rows, _RECENT)  # steps since the last turn
        self.usual = Usual((*self._rows, mesh.replicas))
        self._past = Past((*self._rows, mesh.replicas))

    @property
    def learnt_steps(self) -> int:
        return self._residuals.learnt

    @property
    def has_majority(self) -> bool:
        return self.mesh.replicas >= _MAJORITY

    @property
    def compares_replicas(self) -> bool:
        return self.mesh.replicas > 1

    @property
    def iqr(self) -> np.ndarray:
        """float64 [K, 2, L], never below the table's floor."""
        low, high = self._residuals.quantiles
        return np.asarray(np.maximum(high - low, self._floors))

    def residuals(
        self, comparable: np.ndarray, eligible: np.ndarray, doubtful: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Statistics [K, 2, L, C, M] in comparable units without what is usual of their column, minus their centre.

        Args:
            comparable: float64 [K, 2, L, C, M].
            eligible: bool [2, L, C, M], messages that may set the centre.
            doubtful: bool [2, L], links where they are not to be believed in this step.

        Returns:
            the residuals; and bool [K, 2, L], where the centre is this step's own.
        """
        aligned, current = np.empty_like(comparable), np.empty(self._rows)
        for row, level in enumerate(self.usual.level):  # one at a time stays in the processor's own memory
            np.subtract(comparable[row], level[..., None], out=aligned[row])
            current[row] = median(_samples(aligned[row], eligible))
        own = np.broadcast_to(self.certain(eligible) & ~doubtful, self._rows)
        if self.learnt_steps == 0:
            own = np.ones(self._rows, bool)
        recent = self._recent
        self._turns = self._turned(aligned, current, recent, eligible)
        own = own | self._turns
        self._centre = np.where(own | np.isnan(recent), current, recent)
        self._behind = ~own
        aligned -= self._centre[..., None, None]
        return aligned, own

    def scores(
        self,
        comparable: np.ndarray,
        residuals: np.ndarray,
        eligible: np.ndarray,
        own: np.ndarray,
        room: np.ndarray,
    ) -> np.ndarray:
        """Residuals to scores, of the same shapes: 0 between the quartiles or not available, 1 on the fence.

        Args:
            comparable, eligible: see ``residuals``.
            residuals, own: what it returns.
            room: float64 [C], by how much the fences of a column are wider.
        """
        scores = self._beyond(residuals)
        self._hold_against_this_step(scores, residuals, eligible, own)
        if not (scores > 1.0).any():
            return scores
        # Who sends what the others send stands out nowhere, whatever it used to send.
        among_others = comparable - self._medians(comparable, eligible)[..., None, None]
        known = ~np.isnan(self.reach)
        scores = np.where((own & known)[..., None, None], np.minimum(scores, self._beyond(among_others)), scores)
        if self.has_majority:
            spread = shortest_interval(_samples(residuals, eligible), 1.0 / 3.0)
            wider = own & self._more_than(2, 3, eligible) & (spread > self._range)  # of NaN it is none
            widening = np.where(wider, spread / np.where(wider, self._range, 1.0), 1.0)
            scores = scores / widening[..., None, None]
        elif self.compares_replicas:
            scores = np.where(self._past.moved_alone(comparable, eligible)[..., None], scores, 0.0)
        return np.asarray(scores / room[:, None])

    def certain(self, eligible: np.ndarray) -> np.ndarray:
        """Links where those who tamper cannot be most of the eligible (bool [2, L, C, M]) columns, bool [2, L]."""
        bad = (self.mesh.replicas - 1) // 2
        columns = np.count_nonzero(eligible.any(-1), axis=-1)
        return np.asarray((columns > 2 * bad) & self._more_than(1, 2, eligible))

    def end_turns(self) -> np.ndarray:
        """Where training turned in this step or in the recent ones before it, bool [K, 2, L]; to be called once a step.

        Turned it has where most columns lie beyond the same fence around the recent centre. Honest replicas may then
        differ as they never did, until enough of that is learnt.
        """
        self._settled = np.where(self._turns, 0, np.minimum(self._settled + 1, _RECENT))
        return np.asarray(self._settled < _RECENT)

    def bounds(self, direction: int, link: int, statistic: int) -> tuple[float, float]:
        """Lower and upper fence of a residual."""
        row = (statistic, direction, link)
        low, high = self._residuals.quantiles[(slice(None), *row)]
        return float(low - self.reach[row]), float(high + self.reach[row])

    def learn(
        self,
        comparable: np.ndarray,
        residuals: np.ndarray,
        clean: np.ndarray,
        followed: np.ndarray,
        unlike: np.ndarray,
        step: int,
    ) -> None:
        """Remember the residuals of clean messages and renew the bounds; follow what is usual of each column.

        Args:
            comparable, residuals: float64 [K, 2, L, C, M].
            clean: bool [2, L, C, M].
            followed: bool [K, 2, L, C, M], from which to learn what is usual.
            unlike: bool [C], columns whose content is unlike the others'.
            step: the engine's global step.
        """
        if self.mesh.replicas == 2:
            self._past.learn(comparable, clean)
            if not clean.all():
                return  # what is left of a pair is measured from the middle between the two
        centre = self._followed(residuals, clean) if self.has_majority else self._medians(comparable, clean)
        slot = self._centres[..., self.learnt_steps % self.window]
        slot[...] = np.where(np.isnan(centre), slot, centre)
        if self.compares_replicas:
            explained = np.broadcast_to(unlike, self.usual.level.shape)
            self.usual.learn(residuals, followed, explained, self.reach)
        self._renew(*self._residuals.learn(_samples(residuals, clean), step))

    def state_dict(self) -> dict[str, np.ndarray]:
        parts = {"usual": self.usual.state_dict(), "past": self._past.state_dict()}
        named = {f"{part}_{name}": array for part, state in parts.items() for name, array in state.items()}
        named |= {"centres": self._centres.copy(), "reach": self.reach.copy(), "range": self._range.copy()}
        return {**self._residuals.state_dict(), **named, "settled": self._settled.copy()}

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of what a state may hold, by name."""
        least = float(self._floors.min())
        return {"reach": (least, LARGEST), "range": (least, LARGEST), "usual_level": (-FARTHEST, FARTHEST)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._residuals.load_state_dict(state)
        self._centres, self.reach = np.array(state["centres"]), np.array(state["reach"])
        self._range, self._settled = np.array(state["range"]), np.array(state["settled"])
        for part, keeper in (("usual", self.usual), ("past", self._past)):
            keeper.load_state_dict(
                {name.removeprefix(f"{part}_"): array for name, array in state.items() if name.startswith(f"{part}_")}
            )

    def _beyond(self, residuals: np.ndarray) -> np.ndarray:
        """Distance beyond the nearer quartile in reaches; 0 where not available."""
        low, high = (bound[..., None, None] for bound in self._residuals.quantiles)
        reach = np.where(np.isnan(self.reach), np.inf, self.reach)[..., None, None]
        result = np.empty_like(residuals)
        for row, outside in enumerate(result):
            np.subtract(residuals[row], high[row], out=outside)
            np.fmax(low[row] - residuals[row], outside, out=outside)
            np.fmax(outside, 0.0, out=outside)
            outside /= reach[row]
        return result

    def _medians(self, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Of those of a link's messages (bool [2, L, C, M]), float64 [K, 2, L]."""
        return np.stack([median(_samples(row, chosen)) for row in values])

    @property
    def _recent(self) -> np.ndarray:
        """The centre of recent steps, float64 [K, 2, L]. It only stands in for a step, so it should be the latest."""
        slots = (self.learnt_steps - 1 - np.arange(min(_RECENT, self.learnt_steps))) % self.window
        return median(self._centres[..., slots])

    def _followed(self, residuals: np.ndarray, clean: np.ndarray) -> np.ndarray:
        """The last step's centre, float64 [K, 2, L]; where it was not that step's own, moved towards it."""
        if not self._behind.any():
            return self._centre
        most = np.where(np.isnan(self.reach), np.inf, FOLLOWED * self.reach)
        lag = np.where(self._behind, self._medians(residuals, clean), 0.0)
        return np.asarray(self._centre + np.clip(lag, -most, most))

    def _turned(self, aligned: np.ndarray, current: np.ndarray, recent: np.ndarray, eligible: np.ndarray) -> np.ndarray:
        """See ``end_turns``; with a single replica nothing tells training from tampering."""
        low, high = self._residuals.quantiles
        left, right = recent + low - self.reach, recent + high + self.reach
        result = ((current < left) | (current > right)) & self.compares_replicas
        for row, direction, link in np.argwhere(result).tolist():
            where = (row, direction, link)
            values = np.where(eligible[direction, link], aligned[where], np.nan)
            beyond = values < left[where] if current[where] < left[where] else values > right[where]
            messages = np.count_nonzero(~np.isnan(values), axis=-1)
            columns = np.count_nonzero(2 * np.count_nonzero(beyond, axis=-1) > messages)
            result[where] = 2 * columns > self.mesh.replicas
        return result

    def _hold_against_this_step(
        self, scores: np.ndarray, residuals: np.ndarray, eligible: np.ndarray, own: np.ndarray
    ) -> None:
        """Score, in place, what has no fence yet."""
        if not self.has_majority:
            return
        new = np.isnan(self.reach) & own & ~np.isnan(residuals).all(axis=(-2, -1))
        if new.any():
            half = shortest_interval(_samples(residuals, eligible)[new], 0.5)
            limit = np.fmax(ROUGHLY * half, GROSS)[:, None, None]
            scores[new] = np.fmax(np.abs(residuals[new]) / limit, 0.0)

    def _more_than(self, numerator: int, denominator: int, eligible: np.ndarray) -> np.ndarray:
        """Links where more than that share of the columns is eligible, bool [2, L]; never with a single replica."""
        columns = np.count_nonzero(eligible.any(-1), axis=-1)
        return (denominator * columns > numerator * self.mesh.replicas) & self.compares_replicas

    def _renew(self, links: list[int], ordered: Ordered) -> None:
        if not links:
            return
        low, high = self._residuals.quantiles[..., links]
        iqr, full = self.iqr[..., links], self._residuals.steps_heard[..., links] >= self.window
        # Whatever lies far beyond the quartiles is among the least or the largest.
        outer = ordered.outer(int(np.ceil(self._rate * ordered.values.shape[-1])) + 2)
        beyond = np.sort(np.maximum(np.maximum(low[..., None] - outer, outer - high[..., None]), 0.0), axis=-1)
        found = np.count_nonzero(~np.isnan(beyond), axis=-1)
        last = np.maximum(ordered.count - 1, 0)
        position = (1.0 - self._rate) * last
        rank = position.astype(np.intp)

        def of_rank(rank: np.ndarray) -> np.ndarray:
            from_end = found - (ordered.count - rank)
            return np.take_along_axis(beyond, np.maximum(from_end, 0)[..., None], -1)[..., 0]

        at_low, at_high = of_rank(rank), of_rank(np.minimum(rank + 1, last))
        tail = at_low + (at_high - at_low) * (position - rank)
        seen = np.maximum(ordered.count, 2)
        # With fewer samples than 1 / rate the tail is extended as if scores fell off exponentially.
        stretch = np.maximum(1.0, -exact.log(np.array(self._rate)) / exact.log(seen))
        doubt = 1.0 + STEP_DOUBT / np.sqrt(np.maximum(self._residuals.steps_heard[..., links], 1))
        tail_reach = MARGIN * doubt * stretch * tail
        grown_range, grown_reach = GROWTH * self._range[..., links], GROWTH * self.reach[..., links]
        self._range[..., links] = np.maximum(np.where(full, np.fmin(iqr, grown_range), iqr), self._floors)
        tail_reach = np.where(full, np.fmin(tail_reach, grown_reach), tail_reach)
        self.reach[..., links] = np.maximum(self.multiplier * self._range[..., links], tail_reach)


def _samples(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Those of a link's messages (bool [2, L, C, M]) in one axis, float64 [..., 2, L, C * M], NaN for the others."""
    return (values if chosen.all() else np.where(chosen, values, np.nan)).reshape(*values.shape[:-2], -1)
