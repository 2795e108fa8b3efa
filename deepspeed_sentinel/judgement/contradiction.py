"""What the two ends of a link report of the same messages, where it is not the same."""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence.table import RECEIVED, SENT, Rows, comparable
from deepspeed_sentinel.judgement.fences import Fences
from deepspeed_sentinel.judgement.robust import median


def contradictions(statistics: np.ndarray, fences: Fences, table: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Messages about which the two ends, and those about whose sender its two neighbours, report different numbers.

    Different means further apart than an inter-quartile range. Each end measures against its own copy of the baseline,
    and a liar among the replicas that hold one copy must not be able to set honest neighbours at odds. What most
    columns of a link show alike is therefore of the copies, and not of the column: it is subtracted, and where most
    have a number at one end alone, or differ in spite of it, that says nothing. Otherwise all columns would be left
    out, nothing learnt any more, and the copies never become alike again.

    Args:
        statistics: [2 ends, 2, L, C, M, P * K], as in ``Evidence``.
        fences: whose ranges are the measure.
        table: the rows.

    Returns:
        bool [2, L, C, M] each: by the two ends of a link, and by the two neighbours of a worker.
    """
    bits = np.ascontiguousarray(np.moveaxis(statistics, -1, 1)).view(f"i{statistics.itemsize}")
    unequal = (bits[SENT] != bits[RECEIVED]).any(0)
    if not unequal.any():
        return unequal, unequal
    sent, received = (comparable(statistics[end][unequal].T.astype(np.float64)) for end in (SENT, RECEIVED))
    difference = np.where(np.isnan(np.moveaxis(statistics[RECEIVED], -1, 0)), np.nan, 0.0)
    difference[:, unequal] = sent - received
    gone = np.zeros(difference.shape, bool)
    gone[:, unequal] = np.isnan(sent) != np.isnan(received)
    copies = table.to_baseline
    if fences.has_majority:
        flat = difference[copies].reshape(*difference[copies].shape[:3], -1)
        difference[copies] -= np.nan_to_num(median(flat))[..., None, None]
        mostly = 2 * np.count_nonzero(gone[copies], axis=(3, 4)) > flat.shape[-1]
        gone[copies] &= ~mostly[..., None, None]
    with np.errstate(invalid="ignore"):
        apart = (np.abs(difference) > fences.iqr[..., None, None]) | gone
    if fences.has_majority:
        columns = np.count_nonzero(apart[copies].any((0, 4)), axis=-1)
        apart[copies] &= (2 * columns <= difference.shape[3])[..., None, None]
    return apart[~(table.hard | table.of_pair)].any(0), apart[table.of_pair].any(0)
