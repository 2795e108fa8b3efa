"""What the two ends of a link report of the same messages, where it is not the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.evidence.table import Rows, comparable
from deepspeed_sentinel.judgement.fences import Fences
from deepspeed_sentinel.judgement.reports import Reports
from deepspeed_sentinel.judgement.robust import median


@dataclass(frozen=True)
class Contradictions:
    """Where reports differ.

    Attributes:
        by_ends: bool [2, L, C, M], messages about which the two ends of a link are in dispute.
        certain: bool [2, L, C, M], those of them whose own numbers differ, that rest on no baseline.
        by_neighbours: bool [2, L, C, M], messages about whose sender its two neighbours are.
        doubted: bool [K, 2, L, C, M], statistics to a baseline that the ends report differently, in dispute or not: by
            one of them alone nobody is struck.
        neither: bool [K, 2, L, C, M], those of them of which neither report is to be used.
    """

    by_ends: np.ndarray
    certain: np.ndarray
    by_neighbours: np.ndarray
    doubted: np.ndarray
    neither: np.ndarray

    @classmethod
    def none(cls, messages: tuple[int, ...], rows: int) -> Contradictions:
        """Of messages of this shape, [2, L, C, M]."""
        of_messages, of_rows = np.zeros(messages, bool), np.zeros((rows, *messages), bool)
        return cls(of_messages, of_messages, of_messages, of_rows, of_rows)


def contradictions(reports: Reports, fences: Fences, table: Rows) -> Contradictions:
    """Messages about which the two ends, and those about whose sender its two neighbours, report different numbers.

    Different means further apart than an inter-quartile range. Each end measures against its own copy of the baseline,
    and a liar among the replicas that hold one copy must not be able to set honest neighbours at odds. What most
    columns of a link show alike is therefore of the copies, and not of the column: it is subtracted, and where most
    have a number at one end alone, or differ in spite of it, nobody is in dispute. Otherwise all columns would be left
    out, nothing learnt any more, and the copies never become alike again.

    But most columns may be a minority of each end's workers, who say so to be in no dispute. So what differs accuses
    nobody in any case, and where most differ in spite of what they show alike, neither number is used. Two ends that
    report the same are in no dispute, whatever others show alike.

    Args:
        reports: statistics as reported.
        fences: whose ranges are the measure.
        table: the rows.
    """
    sent, received = reports.sent, reports.received
    messages = received.shape[1:]
    if reports.alike:
        return Contradictions.none(messages, len(table))
    whole = f"i{received.itemsize}"
    unequal = np.zeros(messages, bool)
    for of_sender, of_receiver in zip(sent, received, strict=True):
        unequal |= of_sender.view(whole) != of_receiver.view(whole)
    difference = np.where(np.isnan(received), np.nan, 0.0)
    sent, received = (comparable(rows[:, unequal].astype(np.float64)) for rows in (sent, received))
    difference[:, unequal] = sent - received
    gone = np.zeros(difference.shape, bool)
    gone[:, unequal] = np.isnan(sent) != np.isnan(received)
    ranges = fences.iqr[..., None, None]
    with np.errstate(invalid="ignore"):
        apart = (np.abs(difference) > ranges) | gone
    copies = table.to_baseline
    doubted, neither = np.zeros_like(apart), np.zeros_like(apart)
    doubted[copies] = apart[copies]
    if fences.has_majority:
        flat = difference[copies].reshape(*difference[copies].shape[:3], -1)
        difference[copies] -= np.nan_to_num(median(flat))[..., None, None]
        mostly = (2 * np.count_nonzero(gone[copies], axis=(3, 4)) > flat.shape[-1])[..., None, None]
        gone[copies] &= ~mostly
        with np.errstate(invalid="ignore"):
            apart[copies] &= (np.abs(difference[copies]) > ranges[copies]) | gone[copies]
        columns = np.count_nonzero(apart[copies].any((0, 4)), axis=-1)
        most = (2 * columns > difference.shape[3])[..., None, None]
        neither[copies] = doubted[copies] & (most | mostly)
        apart[copies] &= ~most
    by_copies, certain = apart[copies].any(0), apart[~(table.hard | table.of_pair | copies)].any(0)
    return Contradictions(by_copies | certain, certain, apart[table.of_pair].any(0), doubted, neither)
