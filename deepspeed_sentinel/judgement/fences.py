"""Fences: bounds from the inter-quartile range of recent clean residuals, one pair per boundary and statistic.

A residual is what is left of a statistic without what is usual of its column (``usual.py``) and without its centre
(``centre.py``). The residuals and scores of a step ``held.py`` works out.

    score = distance beyond the nearer quartile / (k * IQR * w * room)     1 = on the fence
    k     = max(multiplier, margin * the clean score that the target rate of false alarms allows)
    w     = max(1, shortest interval that holds a third of this step's residuals / IQR)
    room  = more than 1 where the column's content is new (``content.py``)

A message is as far out as the smaller of its distances from its column's usual and from what the other replicas send.

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
from deepspeed_sentinel.judgement.centre import Centre, of_samples
from deepspeed_sentinel.judgement.few import Past
from deepspeed_sentinel.judgement.pieces import in_a_row, pieces
from deepspeed_sentinel.judgement.robust import Ordered, median
from deepspeed_sentinel.judgement.state import LARGEST
from deepspeed_sentinel.judgement.usual import FARTHEST, Usual
from deepspeed_sentinel.judgement.window import SAMPLES, Window
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
_MAJORITY = 3
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
        # With fewer samples than 1 / rate the tail is extended as if scores fell off exponentially.
        seen = np.maximum(np.arange(max(SAMPLES, window) + 1), 2)
        self._stretch = np.maximum(1.0, -exact.log(np.array(self._rate)) / exact.log(seen))
        self._floors = table.floors[:, None, None]
        self._rows = (len(table), 2, mesh.links)
        self._residuals = Window(self._rows, window, (0.25, 0.75), seed)
        self.reach = np.full(self._rows, np.nan)
        self._range = np.full(self._rows, np.nan)  # the IQR, but in a full window it grows by GROWTH at most
        self.centre = Centre(mesh, self._rows)
        self.usual = Usual((*self._rows, mesh.replicas))
        self.past = Past((*self._rows, mesh.replicas))

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

    def begin(self, convicted: np.ndarray) -> None:
        """Before the messages of a step are held against what was learnt, those of convicted workers bool [2, L, C]."""
        self.centre.begin(self.learnt_steps == 0, convicted, self._residuals.quantiles, self.reach)

    def known(self, links: slice) -> np.ndarray:
        """Where there is a fence, bool [K, N], of some of the links of both directions in a row."""
        return ~np.isnan(in_a_row(self.reach)[:, links])

    def range_of(self, links: slice) -> np.ndarray:
        """What reaches are multiples of, float64 [K, N]."""
        return in_a_row(self._range)[:, links]

    def beyond(self, links: slice, residuals: np.ndarray) -> np.ndarray:
        """Distance of residuals (float64 [K, N, C, M]) beyond the nearer quartile in reaches; 0 where not available."""
        low, high = in_a_row(self._residuals.quantiles, 2)[:, :, links, None, None]
        reach = in_a_row(self.reach)[:, links, None, None]
        # By the nearest place between the quartiles: which of the two is nearer, no processor can foretell.
        result = np.minimum(residuals, high)
        np.maximum(result, low, out=result)
        np.subtract(residuals, result, out=result)
        np.abs(result, out=result)
        np.fmax(result, 0.0, out=result)
        result /= np.where(np.isnan(reach), np.inf, reach)
        return result

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
        within: np.ndarray,
        unlike: np.ndarray,
        step: int,
    ) -> None:
        """Remember the residuals of clean messages and renew the bounds; follow what is usual of each column.

        Args:
            comparable, residuals: float64 [K, 2, L, C, M].
            clean: bool [2, L, C, M].
            followed, within: from which to learn what is usual, see ``Usual.learn``.
            unlike: bool [C], columns whose content is unlike the others'.
            step: the engine's global step.
        """
        if self.mesh.replicas == 2:
            self.past.learn(comparable, clean)
            if not clean.all():
                return  # what is left of a pair is measured from the middle between the two
        if self.has_majority:
            centre = self.centre.followed(residuals, clean, self.reach)
        else:
            centre = _medians(comparable, clean).reshape(self._rows)
        self.centre.learn(centre, np.asarray(clean.any((-2, -1))))
        if self.compares_replicas:
            self.usual.learn(residuals, followed, within, unlike, self.reach)
        of_link = (*self._rows, -1)
        self._renew(*self._residuals.learn(residuals.reshape(of_link), step, clean.reshape(of_link[1:])))

    def learn_truth(self, comparable: np.ndarray, right: np.ndarray, source: int) -> None:
        """Follow where a twin step has shown training to be; of how far honest messages lie apart it shows nothing.

        Args:
            comparable: float64 [K, 2, L, C, M].
            right: bool [2, L, C, M], messages that are the truth.
            source: the column whose data all have.
        """
        if self.has_majority:
            self.centre.learn_truth(comparable - self.usual.level[..., source, None, None], right, self.reach)

    def state_dict(self) -> dict[str, np.ndarray]:
        parts = {"usual": self.usual.state_dict(), "past": self.past.state_dict()}
        named = {f"{part}_{name}": array for part, state in parts.items() for name, array in state.items()}
        named |= {"reach": self.reach.copy(), "range": self._range.copy()}
        return {**self._residuals.state_dict(), **self.centre.state_dict(), **named}

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of what a state may hold, by name."""
        least = float(self._floors.min())
        return {"reach": (least, LARGEST), "range": (least, LARGEST), "usual_level": (-FARTHEST, FARTHEST)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._residuals.load_state_dict(state)
        self.centre.load_state_dict(state)
        self.reach, self._range = np.array(state["reach"]), np.array(state["range"])
        for part, keeper in (("usual", self.usual), ("past", self.past)):
            keeper.load_state_dict(
                {name.removeprefix(f"{part}_"): array for name, array in state.items() if name.startswith(f"{part}_")}
            )

    def _renew(self, links: list[int], ordered: Ordered) -> None:
        if not links:
            return
        low, high = self._residuals.quantiles[..., links]
        iqr, steps = self.iqr[..., links], self._residuals.steps_heard[..., links]
        full = steps >= self.window
        # Whatever lies far beyond the quartiles is among the least or the largest.
        outer = ordered.outer(int(np.ceil(self._rate * ordered.values.shape[-1])) + 2)
        beyond = Ordered.of(np.maximum(np.maximum(low[..., None] - outer, outer - high[..., None]), 0.0))
        last = np.maximum(ordered.count - 1, 0)
        position = (1.0 - self._rate) * last
        rank = position.astype(np.intp)

        def of_rank(rank: np.ndarray) -> np.ndarray:
            from_end = beyond.count - (ordered.count - rank)
            return beyond.at(np.maximum(from_end, 0))

        at_low, at_high = of_rank(rank), of_rank(np.minimum(rank + 1, last))
        tail = at_low + (at_high - at_low) * (position - rank)
        doubt = 1.0 + STEP_DOUBT / np.sqrt(np.maximum(steps, 1))
        stretch = self._stretch[np.minimum(ordered.count, len(self._stretch) - 1)]
        tail_reach = MARGIN * doubt * stretch * tail
        grown_range, grown_reach = GROWTH * self._range[..., links], GROWTH * self.reach[..., links]
        self._range[..., links] = np.maximum(np.where(full, np.fmin(iqr, grown_range), iqr), self._floors)
        tail_reach = np.where(full, np.fmin(tail_reach, grown_reach), tail_reach)
        self.reach[..., links] = np.maximum(self.multiplier * self._range[..., links], tail_reach)


def _medians(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of those of a link's messages (bool [2, L, C, M]), float64 [K, 2 L]."""
    values, chosen = in_a_row(values), in_a_row(chosen, 0)
    result = np.full(values.shape[:2], np.nan)
    for links in pieces(values):
        result[:, links] = of_samples(median, values[:, links], chosen[links])
    return result
