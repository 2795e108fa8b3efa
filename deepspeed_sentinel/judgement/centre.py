"""Centres: what a step's statistics are measured from, the median of all replicas' messages or of the latest steps.

A step's own median is believed where those who tamper cannot be its side. Fewer than half of a stage do, so at most
n = floor((R - 1) / 2), less those of its convicted workers whose columns are left out anyway, and more than 2 n columns
must be left to set it, of those that nothing spoilt before: with five replicas all five, for two bad among three that
are left are most of them. Otherwise, and always with one replica, the centre is that of the latest steps. Training may
turn meanwhile. Where more than half of those that set that median lie beyond the same fence around the latest centre,
and n + 1 columns, one of them at least is honest, so training did it, and the step's own median holds. Once clean
messages of such a step are learnt, the steps before it count no longer. Of half and half nobody knows which half
training took along.

Where the latest centre stands in for long it has to follow training. As far as n + 1 clean columns say it goes with
them, since one of them is honest, by three tenths of a fence a step at most, for those around a stage may lie about
what it does; and as the others say by a tenth:

    3 of 8 can be bad; a fence is 10 wide; clean columns lie at 2, 5, 6 and 8 from the centre: it moves by 2
    clean columns lie at 4, 5, 6 and 8: it moves by 3
    clean columns lie at 5, 6 and 8: no four are left, so it moves by 1

In a twin step all columns have the data of one, and set no centre among themselves. But what more workers than can be
bad made of it is the truth, and it is followed as clean columns are, without what is usual of the column whose data it
was. Else nothing would be learnt of where training goes while most steps are twin steps or skipped.

``held.py`` asks for the centres of a step, ``fences.py`` has them learnt. Axes are [statistic, link, column,
micro-batch], where the links of both directions stand in a row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deepspeed_sentinel.evidence import exact
from deepspeed_sentinel.judgement.pieces import in_a_row, pieces
from deepspeed_sentinel.judgement.robust import Ordered, median
from deepspeed_sentinel.mesh import Mesh

# Nobody may walk the centre through a fence soon: how far it follows in a step, where n + 1 say so and where fewer do.
SAID_BY_MOST, FOLLOWED = 0.3, 0.1
_LATEST = 3  # steps of which the centre stands in
_ALONE = 8  # the same, where there is but one replica: what begins is to be seen for some steps
_SETTLED = 8  # steps after a turn
_KEPT = ("centres", "settled", "since")


class Centre:
    """The centres of a step, and those of the steps before it.

    Args:
        mesh: the mesh judged.
        rows: (statistics, 2 directions, links).
    """

    def __init__(self, mesh: Mesh, rows: tuple[int, int, int]) -> None:
        self._mesh = mesh
        self._steps = _LATEST if mesh.replicas > 1 else _ALONE
        self._centres = np.full((*rows, self._steps), np.nan)  # the last first
        self._settled = np.full(rows, _SETTLED)  # steps since the last turn
        self._since = np.full(rows, self._steps)  # steps learnt since then, that of the turn included
        shape = (rows[0], rows[1] * rows[2])
        # of the last step's residuals, and where it is not that step's own
        self._centre, self._behind = np.full(shape, np.nan), np.zeros(shape, bool)
        self._turns = np.zeros(shape, bool)
        self._latest, self._low, self._high = (np.full(shape, np.nan) for _ in range(3))
        self._first = True
        self._convicted = np.zeros((shape[1], mesh.replicas), bool)

    def begin(self, first: bool, convicted: np.ndarray, quartiles: np.ndarray, reach: np.ndarray) -> None:
        """Before a step.

        Args:
            first: nothing was learnt yet.
            convicted: bool [2, L, C], messages of convicted workers.
            quartiles: float64 [2, K, 2, L], of residuals.
            reach: float64 [K, 2, L], how far beyond them the fences are.
        """
        self._convicted = in_a_row(convicted, 0)
        self._latest = in_a_row(self._stands_in())
        low, high = in_a_row(quartiles, 2)
        self._low = self._latest + low - in_a_row(reach)
        self._high = self._latest + high + in_a_row(reach)
        self._first = first

    def certain(self, eligible: np.ndarray) -> np.ndarray:
        """Links where those who tamper cannot be most of the eligible (bool [2, L, C, M]) columns, bool [2, L]."""
        replicas = self._mesh.replicas
        columns = exact.count(np.logical_or.reduce(eligible, axis=-1))
        bad = self._most_bad(slice(None), in_a_row(eligible, 0)).reshape(columns.shape)
        return np.asarray((columns > np.maximum(2 * bad, replicas // 2)) & (replicas > 1))

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
        latest = self._latest[:, links]
        turns = self._turned(links, aligned, current, eligible)
        own = own | turns
        centre = np.where(own | np.isnan(latest), current, latest)
        self._turns[:, links], self._behind[:, links], self._centre[:, links] = turns, ~own, centre
        return centre, own

    def end_turns(self) -> np.ndarray:
        """Where training turned in this step or in those just before it, bool [K, 2, L]; to be called once a step.

        Turned it has where more columns than can be bad lie beyond the same fence around the latest centre. Honest
        replicas may then differ as they never did, until enough of that is learnt.
        """
        turns = self._turns.reshape(self._settled.shape)
        self._settled = np.where(turns, 0, np.minimum(self._settled + 1, _SETTLED))
        return np.asarray(self._settled < _SETTLED)

    def followed(self, residuals: np.ndarray, clean: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """The last step's centre, float64 [K, 2, L]; where it was not that step's own, moved as far as that says.

        Args:
            residuals: float64 [K, 2, L, C, M].
            clean: bool [2, L, C, M].
            reach: float64 [K, 2, L], of the fences.
        """
        values, chosen, reach = in_a_row(residuals), in_a_row(clean, 0), in_a_row(reach)
        centre = self._centre.copy()
        for links in pieces(values):
            if (behind := self._behind[:, links]).any():
                shift = self._shift(links, values[:, links], chosen[links], reach[:, links], FOLLOWED)
                moved = centre[:, links] + shift
                centre[:, links] = np.where(behind, moved, centre[:, links])
        return centre.reshape(self._since.shape)

    def learn(self, centre: np.ndarray, clean: np.ndarray) -> None:
        """Remember a step's.

        Args:
            centre: float64 [K, 2, L], NaN where there is none.
            clean: bool [2, L], links with clean messages.
        """
        self._remember(centre, self._turns.reshape(self._since.shape) & clean)

    def learn_truth(self, aligned: np.ndarray, right: np.ndarray, reach: np.ndarray) -> None:
        """Follow what a twin step has shown.

        Args:
            aligned: float64 [K, 2, L, C, M], without what is usual of the column whose data all have.
            right: bool [2, L, C, M], messages that are the truth.
            reach: float64 [K, 2, L], of the fences.
        """
        latest = in_a_row(self._stands_in())
        values, chosen, reach = in_a_row(aligned) - latest[..., None, None], in_a_row(right, 0), in_a_row(reach)
        for links in pieces(values):
            latest[:, links] += self._shift(links, values[:, links], chosen[links], reach[:, links], 0.0)
        self._remember(latest.reshape(self._since.shape), np.zeros(self._since.shape, bool))

    def _most_bad(self, links: slice, chosen: np.ndarray) -> np.ndarray:
        """How many of the senders of these messages (bool [N, C, M]) can be bad, int [N]."""
        away = self._convicted[links] & ~np.logical_or.reduce(chosen, axis=-1)
        return np.maximum((self._mesh.replicas - 1) // 2 - exact.count(away), 0)

    def _stands_in(self) -> np.ndarray:
        """The centre of the latest steps, float64 [K, 2, L]."""
        return median(np.where(np.arange(self._steps) < self._since[..., None], self._centres, np.nan))

    def _shift(
        self, links: slice, residuals: np.ndarray, chosen: np.ndarray, reach: np.ndarray, share: float
    ) -> np.ndarray:
        """How far a centre is to follow, float64 [K, N]; NaN where there is nothing to follow.

        Args:
            links: which, N.
            residuals: float64 [K, N, C, M].
            chosen: bool [N, C, M], what is to be followed.
            reach: float64 [K, N], of the fences.
            share: of it, how far if fewer than n + 1 columns say so.
        """
        reach = np.where(np.isnan(reach), np.inf, reach)
        most = share * reach if share else np.zeros_like(reach)
        shift = np.clip(of_samples(median, residuals, chosen), -most, most)
        columns = Ordered.of(median(np.where(chosen, residuals, np.nan)))
        needed = np.broadcast_to(self._most_bad(links, chosen) + 1, columns.count.shape)
        at_least = columns.at(np.maximum(columns.count - needed, 0))
        at_most = columns.at(needed - 1)
        said = median(np.stack([at_least, shift, at_most], axis=-1)).clip(-SAID_BY_MOST * reach, SAID_BY_MOST * reach)
        return np.where(columns.count >= needed, said, shift)

    def _remember(self, centre: np.ndarray, turned: np.ndarray) -> None:
        known = ~np.isnan(centre)
        now = np.concatenate([centre[..., None], self._centres[..., :-1]], axis=-1)
        self._centres = np.where(known[..., None], now, self._centres)
        since = np.where(turned, 1, np.minimum(self._since + 1, self._steps))
        self._since = np.where(known, since, self._since)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, f"_{name}").copy() for name in _KEPT}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        for name in _KEPT:
            setattr(self, f"_{name}", np.array(state[name]))

    def _turned(self, links: slice, aligned: np.ndarray, current: np.ndarray, eligible: np.ndarray) -> np.ndarray:
        """See ``end_turns``; with a single replica nothing tells training from tampering."""
        left, right = self._low[:, links], self._high[:, links]
        result = ((current < left) | (current > right)) & (self._mesh.replicas > 1)
        bad = self._most_bad(links, eligible)
        for where in zip(*(axis.tolist() for axis in result.nonzero()), strict=True):
            values = np.where(eligible[where[1]], aligned[where], np.nan)
            beyond = values < left[where] if current[where] < left[where] else values > right[where]
            messages = np.count_nonzero(~np.isnan(values), axis=-1)
            columns = np.count_nonzero(2 * np.count_nonzero(beyond, axis=-1) > messages)
            result[where] = columns > max(bad[where[1]], 1, np.count_nonzero(messages) // 2)
        return result


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
