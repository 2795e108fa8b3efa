"""Weak but persistent tampering: a worker's small deviations, summed over micro-batches and steps.

    r  = mean over a worker's messages of a step of the residual of a pair's statistic, per direction
    d  = r sqrt(columns it served), minus its median over the replicas, over its spread of late; minus its own usual d
    u  = normal score of d among those of recent steps: where r is usual, u is normal. Up to two standard deviations it
         is d's place among each replica's own, and of these places the median: one that jumps about, or fewer than
         half, would otherwise make what all others do look small
    C+ = max(0, C+ + u - SLACK),  C- = max(0, C- - u - SLACK)          score = (max(C+, C-) / LIMIT)^2

Page's cumulative sum test (1954) on normal scores (van der Waerden 1952), which know no heavy tails: for independent u
it crosses LIMIT by chance in about one of exp(2 SLACK LIMIT) steps. Only statistics of pairs are summed: they tell what
a worker made of what it was given, while those of single messages follow the content of the batch. Each worker is
compared with its own past, because honest ones differ lastingly too, in their data, say. The square makes a score of
one half as rare as it is for fences.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence import exact
from deepspeed_sentinel.evidence.table import Rows
from deepspeed_sentinel.judgement.clean import sent_by
from deepspeed_sentinel.judgement.pieces import sums
from deepspeed_sentinel.judgement.robust import Ordered, median
from deepspeed_sentinel.judgement.window import Window
from deepspeed_sentinel.mesh import Mesh

SLACK, LIMIT = 1.5, 8.0
_HIGHEST = 1.5 * LIMIT  # so that a worker that stops tampering is heard of soon
_STEPS = 64
_USUAL_DECAY, _SPREAD_DECAY = 0.97, 0.7
_KNOWN = 0.2  # weight that what is usual has after eight steps
# All deviations are from the replicas' median. Among three or four, one whose data turn to another kind moves that by
# as much as what adds up, before it can be told from the others, so nothing is added up there.
LEAST_REPLICAS = 5
_QUIET = 1.0
_TYPICAL = 4.0  # spreads; what lies further out would move the worker's usual deviation for long
_WIDEST = 1e39  # what float32 numbers can lie apart
_HIGHEST_SCORE = 4.0  # of what lies further out than anything in the window
_KNOTS = np.arange(-12, 13) / 4.0
_INNER = np.abs(_KNOTS) <= 2.0  # as far as 64 steps of one replica tell of
# Beyond that the quantiles of all together hold, but none is further out than those of Student's t of three degrees.
_BEYOND = np.abs(_KNOTS / 2.0 * _KNOTS / 2.0 * _KNOTS / 2.0)
_SMALLEST = 1e-9
_ONE_PART = Rows(1)
_STATE = ("sums", "usual", "weight", "spread", "quantiles")
_OUTERMOST = np.array([0.0, *(exact.normal_quantile(n / (n + 1)) for n in range(1, 1024))])
_PROBABILITIES = tuple(exact.normal_probability(float(knot)) for knot in _KNOTS)


class Cusum:
    """Sums per worker, for what it sends forward and backward.

    Args:
        mesh: the mesh judged.
        seed: of the choice which samples are remembered.
        table: the rows judged.
    """

    def __init__(self, mesh: Mesh, seed: int, table: Rows = _ONE_PART) -> None:
        self._mesh = mesh
        shape = (int(np.count_nonzero(table.of_pair)), 2, mesh.links, mesh.replicas)
        self._sums = np.zeros((2, *shape))
        self._sums_before = self._sums
        self._usual = np.zeros(shape)
        self._weight = np.zeros(shape)
        self._spread = np.full(shape[:-1], np.nan)
        self._window = Window(shape[:-1], _STEPS, _PROBABILITIES, seed)
        self._quantiles = np.full((len(_KNOTS), *shape[:-1]), np.nan)
        self._learnt = table.learnt[table.of_pair]

    def step(
        self,
        residuals: np.ndarray,
        counted: np.ndarray,
        served: np.ndarray,
        convicted: np.ndarray,
        step: int,
        warming_up: bool,
        unlike: np.ndarray | None = None,
        renewed: np.ndarray | None = None,
        level: np.ndarray | None = None,
    ) -> np.ndarray:
        """Add one step and score it.

        Args:
            residuals: float64 [pairs' statistics, 2, L, C, M], NaN where not available.
            counted: bool [2, L, C, M], messages that say something about their sender: no cascade, no dispute.
            served: int [S, C], which replica served which column.
            convicted: bool [S, R], workers to go on summing for, but not to learn from.
            step: the engine's global step.
            warming_up: learn what is usual, accuse nobody.
            unlike: bool [C], columns whose content is unlike the others'; None is none. What is usual changes there
                without any worker's doing, so nothing is added, what was fades, and what is usual is learnt anew
                when it is over.
            renewed: bool [2, S, C], stages whose pair is measured in another projection from this step on, where what
                is usual in statistics that rest on what was learnt is another too; None is none.
            level: float64 [pairs' statistics, 2, L, C], what to add to the residuals of a column; NaN where they are
                not to be summed. None is nothing.

        Returns:
            float64 [pairs' statistics, 2, L, C]: the score of the worker that sent over that link in that column.
        """
        if unlike is None:
            unlike = np.zeros(self._mesh.replicas, bool)
        # The median that all are measured from moves when columns leave it or come back: without two of five, what is
        # usual of the others is another.
        unlike = unlike | (4 * np.count_nonzero(~unlike) <= 3 * self._mesh.replicas)
        mean, columns = self._by_worker(residuals, level, counted & ~unlike[:, None], served)
        deviation = self._in_spreads(mean * np.sqrt(columns))
        faded = _of_senders(np.broadcast_to(unlike, (2, *served.shape)), served)
        self._forget_usual(faded, np.ones(len(self._learnt), bool))
        if renewed is not None:
            self._forget_usual(_of_senders(renewed, served), self._learnt)
        # What a fault may have left does not stay for ever.
        self._sums = np.where(np.isfinite(self._sums), self._sums, 0.0)
        lost = ~(np.isfinite(self._usual) & np.isfinite(self._weight))
        if lost.any():
            self._usual, self._weight = np.where(lost, 0.0, self._usual), np.where(lost, 0.0, self._weight)
        usual = self._usual / np.maximum(self._weight, _SMALLEST)
        # An error in what is usual adds up like a deviation, so it must be known from some steps.
        difference = np.where(self._weight > _KNOWN, deviation - usual, np.nan)
        # By the sums before this step: what is learnt must not depend on whether it is far out.
        quiet = self._sums.max(0) < _QUIET
        self._sums_before = self._sums
        if not warming_up:
            score = self._normal_score(difference)
            grown = np.clip(self._sums + np.stack([score, -score]) - SLACK, 0.0, _HIGHEST)
            fading = np.where(faded, np.maximum(self._sums - SLACK, 0.0), self._sums)
            self._sums = np.where(np.isnan(score), fading, grown)
        share_of_limit = self._sums.max(0) / LIMIT
        scores = share_of_limit * share_of_limit
        trusted = ~sent_by(convicted)
        self._learn(deviation, difference, trusted & quiet, step)
        senders = sent_by(served)
        return np.take_along_axis(scores, np.broadcast_to(senders, (len(scores), *senders.shape)), axis=-1)

    def quiet(self, served: np.ndarray) -> np.ndarray:
        """Where next to nothing has added up against the sender, bool [pairs' statistics, 2, L, C]."""
        senders = sent_by(served)
        quiet = self._sums.max(0) < _QUIET
        return np.take_along_axis(quiet, np.broadcast_to(senders, (len(quiet), *senders.shape)), axis=-1)

    def retract(self, direction: int, link: int, replica: int, to_zero: bool) -> None:
        """Take back what the last step added for the replica that sends over a link, or with ``to_zero`` all of it.

        The neighbours of a worker could otherwise raise its sums with lies, and let honest steps convict it.
        """
        of_worker = (..., direction, link, replica)
        kept = np.zeros_like(self._sums_before[of_worker]) if to_zero else self._sums_before[of_worker]
        self._sums = self._sums.copy()
        self._sums[of_worker] = kept

    def forget_usual(self, workers: np.ndarray) -> None:
        """Learn anew what is usual of these, bool [S, R], since they are given other data from now on."""
        self._forget_usual(sent_by(workers), np.ones(len(self._learnt), bool))

    def forget(self, workers: np.ndarray) -> None:
        """Take back all that was added for these, bool [S, R]."""
        self._sums = np.where(sent_by(workers), 0.0, self._sums)

    def state_dict(self) -> dict[str, np.ndarray]:
        window = {f"window_{name}": array for name, array in self._window.state_dict().items()}
        return {**window, **{name: getattr(self, f"_{name}").copy() for name in _STATE}}

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of what a state may hold, by name."""
        typical = _TYPICAL + _SMALLEST
        return {"sums": (0.0, _HIGHEST), "usual": (-typical, typical), "weight": (0.0, 1.0), "spread": (0.0, _WIDEST)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._window.load_state_dict({name: state[f"window_{name}"] for name in self._window.state_dict()})
        for name in _STATE:
            setattr(self, f"_{name}", np.array(state[name]))

    def _forget_usual(self, chosen: np.ndarray, statistics: np.ndarray) -> None:
        """Of these workers (bool [2, L, R]), in some statistics of pairs (bool [K])."""
        if not chosen.any():
            return
        forgotten = statistics[:, None, None, None] & chosen
        self._usual = np.where(forgotten, 0.0, self._usual)
        self._weight = np.where(forgotten, 0.0, self._weight)

    def _learn(self, deviation: np.ndarray, difference: np.ndarray, sound: np.ndarray, step: int) -> None:
        sound = sound & np.isfinite(deviation)
        links, _ = self._window.learn(np.where(sound, difference, np.nan), step)
        self._renew(links)
        typical = np.clip(np.nan_to_num(deviation), -_TYPICAL, _TYPICAL)
        self._usual = np.where(sound, _USUAL_DECAY * self._usual + (1 - _USUAL_DECAY) * typical, self._usual)
        self._weight = np.where(sound, _USUAL_DECAY * self._weight + (1 - _USUAL_DECAY), self._weight)

    def _renew(self, links: list[int]) -> None:
        """The quantiles that scores are read from, of these links."""
        pooled = self._window.quantiles[..., links]
        self._quantiles[..., links] = pooled
        if self._window.learnt < _STEPS // 2 or not links:
            return
        own = Ordered.of(np.swapaxes(self._window.samples(links), -1, -2))
        enough = median(own.count.astype(np.float64)) >= _STEPS // 2
        inner = np.flatnonzero(_INNER)
        typical = median(own.quantiles(tuple(_PROBABILITIES[knot] for knot in inner)))
        chosen = np.where(enough, typical, pooled[inner])
        first, last = inner[0], inner[-1] + 1
        # Unknown is no limit: fmax and fmin pass over NaN.
        known = np.where(enough, 1.0, np.nan)
        low = np.fmax(pooled[:first], chosen[0] * known * _BEYOND[:first, None, None, None])
        high = np.fmin(pooled[last:], chosen[-1] * known * _BEYOND[last:, None, None, None])
        low, high = np.fmin(low, chosen[0]), np.fmax(high, chosen[-1])
        self._quantiles[..., links] = np.concatenate([low, chosen, high])

    def _in_spreads(self, mean: np.ndarray) -> np.ndarray:
        """Minus what the replicas share and over its typical size: training drifts, and grows calmer or wilder."""
        # Of fewer than half of them the median may be anybody's: nothing is added up.
        heard = exact.count(~np.isnan(mean))
        centre = np.where(2 * heard > self._mesh.replicas, median(mean), np.nan)
        deviation = mean - centre[..., None]
        typical = median(np.abs(deviation))
        smoothed = _SPREAD_DECAY * self._spread + (1 - _SPREAD_DECAY) * typical
        self._spread = np.where(np.isnan(smoothed), np.where(np.isnan(typical), self._spread, typical), smoothed)
        return np.asarray(deviation / np.maximum(self._spread, _SMALLEST)[..., None])

    def _normal_score(self, difference: np.ndarray) -> np.ndarray:
        """float64 [K, 2, L, R], linear between the knots and beyond them; NaN where not available."""
        knots = self._quantiles[..., None]
        above = np.zeros(difference.shape, np.int64)
        for knot in knots:
            above += difference > knot
        right = np.clip(above, 1, len(_KNOTS) - 1)
        at_left, at_right = (np.take_along_axis(knots, index[None], 0)[0] for index in (right - 1, right))
        share = np.clip((difference - at_left) / np.maximum(at_right - at_left, _SMALLEST), 0.0, 1.0)
        score = _KNOTS[right - 1] + share * (_KNOTS[right] - _KNOTS[right - 1])
        outermost = np.where(difference > 0, knots[-1], knots[0])
        beyond = np.maximum(np.abs(difference) / np.maximum(np.abs(outermost), _SMALLEST), 1.0)
        # The outermost of few samples is not far out.
        known = _OUTERMOST[np.minimum(self._window.counts, len(_OUTERMOST) - 1)][..., None]
        score = np.clip(np.clip(score, -known, known) * beyond, -_HIGHEST_SCORE, _HIGHEST_SCORE)
        return np.where(np.isnan(difference) | np.isnan(at_left), np.nan, score)

    def _by_worker(
        self, residuals: np.ndarray, level: np.ndarray | None, counted: np.ndarray, served: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean over each sender's messages that count, [K, 2, L, R], NaN where none does; and how many columns."""
        by_column, counts = sums(residuals, counted, level)
        senders = sent_by(served)
        rows = np.arange(counts[..., 0].size).reshape(*counts.shape[:-1], 1) * self._mesh.replicas
        # column after column: a matrix product would add in an order of its own
        total, messages, columns = (
            np.bincount((rows + senders).ravel(), array.ravel(), counts.size).reshape(counts.shape)
            for array in (by_column, counts, counts > 0)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return total / messages, columns


def _of_senders(chosen_2SC: np.ndarray, served: np.ndarray) -> np.ndarray:
    """Which workers send for these stages and columns, bool [2, L, R] of [2, S, C]."""
    senders, chosen = sent_by(served), np.array([chosen_2SC[0, :-1], chosen_2SC[1, 1:]])
    result = np.zeros(senders.shape, bool)
    if not chosen.any():
        return result
    np.logical_or.at(result, (*np.indices(senders.shape)[:2], senders), chosen)
    return result
