"""Centres: what a step's statistics are measured from, the median of all replicas' messages or of recent steps.

A step's own median is believed where those who tamper cannot be its side. Fewer than half of a stage do, so at most
n = floor((R - 1) / 2), and more than 2 n columns must be left to set it, of those that nothing spoilt before: with five
replicas all five, for two bad among three that are left are most of them. Otherwise, and always with one replica, the
centre is that of recent steps. Training may turn meanwhile. Where more than half of all columns lie beyond the same
fence around the recent centre, one of them at least is honest, so training did it, and the step's own median holds.
Once clean messages of such a step are learnt, the steps before it are no longer recent.

``held.py`` asks for the centres of a step, ``fences.py`` has them learnt. Axes are [statistic, link, column,
micro-batch], where the links of both directions stand in a row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deepspeed_sentinel.evidence import exact
from deepspeed_sentinel.judgement.pieces import in_a_row
from deepspeed_sentinel.judgement.robust import median
from deepspeed_sentinel.mesh import Mesh

# Where the recent centre stands in for long it has to follow training, but nobody may walk it through a fence soon.
FOLLOWED = 0.1
_RECENT = 8
_KEPT = ("centres", "settled", "since")


class Centre:
    """The centres of a step, and those of the steps before it.

    Args:
        mesh: the mesh judged.
        rows: (statistics, 2 directions, links).
        window: steps remembered.
    """

    def __init__(self, mesh: Mesh, rows: tuple[int, int, int], window: int) -> None:
        self._mesh = mesh
        self._window = window
        self._centres = np.full((*rows, window), np.nan)
        self._settled = np.full(rows, _RECENT)  # steps since the last turn
        self._since = np.full(rows, _RECENT)  # steps learnt since then, that of the turn included
        shape = (rows[0], rows[1] * rows[2])
        # of the last step's residuals, and where it is not that step's own
        self._centre, self._behind = np.full(shape, np.nan), np.zeros(shape, bool)
        self._turns = np.zeros(shape, bool)
        self._recent, self._low, self._high = (np.full(shape, np.nan) for _ in range(3))
        self._first = True

    def begin(self, learnt: int, quartiles: np.ndarray, reach: np.ndarray) -> None:
        """Before a step.

        Args:
            learnt: steps learnt so far.
            quartiles: float64 [2, K, 2, L], of residuals.
            reach: float64 [K, 2, L], how far beyond them the fences are.
        """
        ago = np.arange(min(_RECENT, learnt))
        latest = self._centres[..., (learnt - 1 - ago) % self._window]
        # It only stands in for a step, so it should be the latest.
        self._recent = in_a_row(median(np.where(ago < self._since[..., None], latest, np.nan)))
        low, high = in_a_row(quartiles, 2)
        self._low = self._recent + low - in_a_row(reach)
        self._high = self._recent + high + in_a_row(reach)
        self._first = learnt == 0

    def of(
        self, links: slice, aligned: np.ndarray, eligible: np.ndarray, believed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The centres of some links, float64 [K, N], and where they are this step's own, bool [K, N].

        Args:
            links: which, N.
            aligned: float64 [K, N, C, M], without what is usual of a column.
            eligible: bool [N, C, M], messages that may set the centre.
            believed: bool [N], links where these are to be believed.
        """
        current = of_samples(median, aligned, eligible)
        own = np.ones(current.shape, bool) if self._first else np.broadcast_to(believed, current.shape)
        recent = self._recent[:, links]
        turns = self._turned(links, aligned, current, eligible)
        own = own | turns
        centre = np.where(own | np.isnan(recent), current, recent)
        self._turns[:, links], self._behind[:, links], self._centre[:, links] = turns, ~own, centre
        return centre, own

    def end_turns(self) -> np.ndarray:
        """Where training turned in this step or in the recent ones before it, bool [K, 2, L]; to be called once a step.

        Turned it has where most columns lie beyond the same fence around the recent centre. Honest replicas may then
        differ as they never did, until enough of that is learnt.
        """
        turns = self._turns.reshape(self._settled.shape)
        self._settled = np.where(turns, 0, np.minimum(self._settled + 1, _RECENT))
        return np.asarray(self._settled < _RECENT)

    @property
    def behind(self) -> np.ndarray:
        """Links where a centre of the last step was not that step's own, bool [2 L]."""
        return np.asarray(self._behind.any(0))

    def followed(self, lag: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """The last step's centre, float64 [K, 2, L]; where it was not that step's own, moved towards it.

        Args:
            lag: float64 [K, 2 L], the median of its clean residuals; anything where it was.
            reach: float64 [K, 2, L], of the fences.
        """
        reach = in_a_row(reach)
        most = np.where(np.isnan(reach), np.inf, FOLLOWED * reach)
        if not self._behind.any():
            return self._centre.reshape(self._settled.shape)
        moved = self._centre + np.clip(np.where(self._behind, lag, 0.0), -most, most)
        return moved.reshape(self._settled.shape)

    def learn(self, centre: np.ndarray, learnt: int, clean: np.ndarray) -> None:
        """Remember a step's.

        Args:
            centre: float64 [K, 2, L], NaN where there is none.
            learnt: steps learnt before it.
            clean: bool [2, L], links with clean messages.
        """
        slot = self._centres[..., learnt % self._window]
        slot[...] = np.where(np.isnan(centre), slot, centre)
        turned = self._turns.reshape(self._since.shape) & clean & ~np.isnan(centre)
        self._since = np.where(turned, 1, np.minimum(self._since + 1, _RECENT))

    def state_dict(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, f"_{name}").copy() for name in _KEPT}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        for name in _KEPT:
            setattr(self, f"_{name}", np.array(state[name]))

    def _turned(self, links: slice, aligned: np.ndarray, current: np.ndarray, eligible: np.ndarray) -> np.ndarray:
        """See ``end_turns``; with a single replica nothing tells training from tampering."""
        left, right = self._low[:, links], self._high[:, links]
        result = ((current < left) | (current > right)) & (self._mesh.replicas > 1)
        for where in zip(*(axis.tolist() for axis in result.nonzero()), strict=True):
            values = np.where(eligible[where[1]], aligned[where], np.nan)
            beyond = values < left[where] if current[where] < left[where] else values > right[where]
            messages = np.count_nonzero(~np.isnan(values), axis=-1)
            columns = np.count_nonzero(2 * np.count_nonzero(beyond, axis=-1) > messages)
            result[where] = 2 * columns > self._mesh.replicas
        return result


def certain(eligible: np.ndarray, replicas: int) -> np.ndarray:
    """Links where those who tamper cannot be most of the eligible (bool [..., C, M]) columns, bool [...]."""
    bad = (replicas - 1) // 2
    columns = exact.count(np.logical_or.reduce(eligible, axis=-1))
    return (columns > max(2 * bad, replicas // 2)) & (replicas > 1)


def more_than(numerator: int, denominator: int, eligible: np.ndarray, replicas: int) -> np.ndarray:
    """Links where more than that share of the columns is eligible, bool [...]; never with a single replica."""
    columns = exact.count(np.logical_or.reduce(eligible, axis=-1))
    return (denominator * columns > numerator * replicas) & (replicas > 1)


def of_samples(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """An order statistic of each link, float64 [K, N].

    Args:
        function: of float64 [..., n], which passes over what is missing, to [...].
        values: float64 [K, N, C, M].
        chosen: bool [N, C, M], the messages that it is of.
    """
    if chosen.all():
        return function(values.reshape(*values.shape[:2], -1))
    return np.stack([function(values[:, link][:, of_link]) for link, of_link in enumerate(chosen)], axis=1)
