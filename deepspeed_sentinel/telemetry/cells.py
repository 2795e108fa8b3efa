"""From recorded events: what is seen of each worker and of each column in each step; ``evidence_plot`` draws it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Event = Mapping[str, Any]
# Above every score inside the fences, in this order, since of steps drawn together the largest is shown.
BEHIND, AT_ODDS, NAMED = 2.0, 3.0, 4.0
_NAMING = ("alarm", "proof", "contradicted", "replay")


@dataclass(frozen=True)
class Cells:
    """What is to be seen, of T steps in a row.

    Attributes:
        first: the first step.
        workers: float [T, S, R]; NaN: nothing was judged; up to 1: the score, inside the fences; ``NAMED``: it is
            outside the fences and blamed, or proved; ``AT_ODDS``: it says or made something else than another, and
            nobody can tell who of them is wrong; ``BEHIND``: outside the fences after something that was wrong before.
        out: bool [T, C], columns that were left out of the step.
        twins, skipped, warming_up: bool [T].
    """

    first: int
    workers: np.ndarray
    out: np.ndarray
    twins: np.ndarray
    skipped: np.ndarray
    warming_up: np.ndarray

    @property
    def last(self) -> int:
        return self.first + len(self.workers) - 1


@dataclass(frozen=True)
class Convicted:
    """A worker was convicted in step ``first``, and still was in step ``last``."""

    stage: int
    replica: int
    first: int
    last: int


def cells_of(events: Sequence[Event]) -> Cells:
    """What is to be seen in the "step" events and those beside them.

    Of a step that was run twice, since a run went on from a checkpoint before it, the later time counts.

    Raises:
        ValueError: there are none, since ``"events": "steps"`` was not set.
    """
    recorded = {event["step"]: event for event in events if event["kind"] == "step"}
    if not recorded:
        raise ValueError('no "step" events: set "events": "steps" in the sentinel block to record every score.')
    first, last = min(recorded), max(recorded)
    stages, replicas = np.shape(recorded[first]["scores"])
    workers = np.full((last - first + 1, stages, replicas), np.nan)
    out = np.zeros((len(workers), replicas), bool)
    twins, skipped, warming_up = np.zeros((3, len(workers)), bool)
    for step, event in recorded.items():
        scores = np.array([[np.nan if one is None else one for one in row] for row in event["scores"]], float)
        # Zero means nothing judged, not very innocent.
        workers[step - first] = np.where(scores > 1, BEHIND, np.where(scores > 0, scores, np.nan))
        out[step - first, event["excluded"]] = True
        warming_up[step - first] = bool(event.get("warming_up"))
    for event in events:
        at = event["step"] - first
        if not 0 <= at < len(workers):
            continue
        twins[at] |= event["kind"] == "twins"
        skipped[at] |= event["kind"] == "skipped"
        for stage, replica, what in _about(event):
            workers[at, stage, replica] = np.fmax(workers[at, stage, replica], what)
    return Cells(first, workers, out, twins, skipped, warming_up)


def _about(event: Event) -> Iterator[tuple[int, int, float]]:
    """Stage and replica of whom an event is about, and what it is."""
    if event["kind"] in _NAMING:
        yield event["stage"], event["replica"], NAMED
    elif event["kind"] == "difference":
        yield from ((*worker, AT_ODDS) for worker in event["workers"])
    elif event["kind"] == "dispute":
        at_fault = event.get("at_fault")
        if at_fault:
            yield (*at_fault, NAMED)
        else:
            yield (*event["sender"], AT_ODDS)
            yield (*event["receiver"], AT_ODDS)


def convictions_of(events: Iterable[Event], last: int) -> list[Convicted]:
    """Who was convicted from when to when, at the longest to step ``last``; a worker may be so more than once."""
    since: dict[tuple[int, int], int] = {}
    found = []
    for event in events:
        if event["kind"] not in ("conviction", "release", "replaced"):
            continue
        worker = (event["stage"], event["replica"])
        if event["kind"] == "conviction":
            since.setdefault(worker, event["step"])
        elif worker in since:
            found.append(Convicted(*worker, since.pop(worker), event["step"] - 1))
    return sorted(
        [*found, *(Convicted(*worker, step, last) for worker, step in since.items())], key=lambda one: one.first
    )


def runs_of(marked: np.ndarray) -> list[tuple[int, int]]:
    """(first, last) of each run of True in bool [T]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]])))
    return [(int(first), int(end) - 1) for first, end in zip(edges[::2], edges[1::2], strict=True)]


def drawn_together(rows: np.ndarray, at_most: int) -> tuple[np.ndarray, int]:
    """The largest of each few steps, so that no more than ``at_most`` are left, and how many were put together.

    A picture has fewer points than a long run has steps, and an alarm of one step must not fall between two of them.

    Args:
        rows: [T, ...], of numbers, NaN where there is nothing, or of bools.
    """
    each = -(-len(rows) // at_most)
    return np.fmax.reduceat(rows, np.arange(0, len(rows), each), axis=0), each
