"""What both ends of every link report of a step, statistic by statistic, for the judge and what it asks first.

Axes are [statistic, direction, link, column, micro-batch]: evidence has the statistics last, though in memory they
mostly stand so already (``evidence/exchange.py``). Ends that report the same bits, as honest ones do, are read once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.evidence.table import RECEIVED, SENT, Rows
from deepspeed_sentinel.mesh import BACKWARD, FORWARD

_MAX_ABS, _NON_FINITE = Rows.all_of("max_abs"), Rows.all_of("non_finite")


@dataclass(frozen=True)
class Reports:
    """Statistics as reported.

    Attributes:
        sent, received: [P * K, 2, L, C, M], of the type of the evidence; not to be written to.
        alike: both ends report the same bits.
    """

    sent: np.ndarray
    received: np.ndarray
    alike: bool

    @classmethod
    def of(cls, statistics: np.ndarray) -> Reports:
        """Of evidence, [2 ends, 2, L, C, M, P * K]."""
        bits = statistics.view(f"i{statistics.itemsize}")
        alike = not (bits[SENT] != bits[RECEIVED]).any()
        received = _by_statistic(statistics[RECEIVED])
        return cls(received if alike else _by_statistic(statistics[SENT]), received, alike)

    @property
    def hard(self) -> np.ndarray:
        """Messages in alarm without a fence, as each end reports them, bool [2 ends, 2, L, C, M]."""
        return self._of_ends(lambda values: _any_number(values[_NON_FINITE]))

    @property
    def largest(self) -> np.ndarray:
        """The largest magnitude of each message, float64 [2 ends, 2, L, C, M]."""
        return self._of_ends(lambda values: np.fmax.reduce(values[_MAX_ABS], axis=0).astype(np.float64))

    def judged(self, table: Rows, void: np.ndarray) -> np.ndarray:
        """What receivers report, and the first and the last stage of what they sent, as ``received``.

        Nothing but hard rows is available of gradients that carry nothing (bool [L, C, M]).
        """
        if self.alike and not void.any():
            return self.received
        values = self.received.copy()
        own = ~table.of_pair
        for direction, link in ((FORWARD, 0), (BACKWARD, -1)):
            values[own, direction, link] = self.sent[own, direction, link]
        for row in np.flatnonzero(~table.hard):
            values[row, BACKWARD][void] = np.nan
        return values

    def _of_ends(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        received = function(self.received)
        return np.array([received if self.alike else function(self.sent), received])


def _by_statistic(statistics: np.ndarray) -> np.ndarray:
    rows_first = statistics.transpose(-1, *range(statistics.ndim - 1))
    if rows_first.flags.c_contiguous:
        return rows_first
    result = np.empty(rows_first.shape, statistics.dtype)
    for link in range(result.shape[2]):  # one at a time stays in the processor's own memory
        result[:, :, link] = rows_first[:, :, link]
    return result


def _any_number(values: np.ndarray) -> np.ndarray:
    """Messages with anything but zero or missing in one of some rows."""
    found = values != 0
    if found.any():
        found &= ~np.isnan(values)
    return np.logical_or.reduce(found, axis=0)
