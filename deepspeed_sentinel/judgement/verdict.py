"""What a step's judgement says."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.mesh import DIRECTIONS, Worker

_SCORE_GRID, _LARGEST_SCORE = 64.0, 1e6
_NOT_FENCED = {
    "passed_on": "other tensors than entered it, {:g} of those that it always passed on unchanged",
    "from_nothing": "a gradient that it made from one that was zero",
}


@dataclass(frozen=True)
class Finding:
    """A suspect of this step: the worker that the blame rule points at, and the worst of its alarms.

    Attributes:
        worker: who produced the messages.
        direction, link, column: where they crossed.
        micro_batches: which of its messages are alarms and first on their micro-batch's way.
        micro_batch: the worst of them.
        statistic: the row of the table that is furthest outside.
        value: that statistic as reported, in its own unit.
        residual, low, high: what was compared and its fences, in the compared unit.
        score: distance from the nearer quartile over the fence's; above 1 is outside. Infinite for a hard row.
        trusted: the worker is in the first or last stage, so it gets no strike: suspect hardware or data.
        overflow: a non-finite gradient that fp16 loss scaling may explain, so it gets no strike.
        rests_on_pair, telling: see ``Grounds``; what rests on a pair is what the worker's neighbours say of it.
        audit: what an audit found, "confirmed" or "open" (no strike); empty without one.
        part: which judged part of the message that statistic is of, from 0; None where messages have but one.
    """

    worker: Worker
    direction: int
    link: int
    column: int
    micro_batches: tuple[int, ...]
    micro_batch: int
    statistic: str
    value: float
    residual: float
    low: float
    high: float
    score: float
    trusted: bool
    overflow: bool
    rests_on_pair: bool
    telling: tuple[int, ...]
    audit: str = ""
    part: int | None = None

    def __str__(self) -> str:
        audited = {"": "", "open": ", audit open: no strike"}.get(self.audit, f", audit {self.audit}")
        if self.statistic in _NOT_FENCED:
            return (
                f"{self.worker} sent over link {self.link} {_NOT_FENCED[self.statistic].format(self.value)}: "
                f"{DIRECTIONS[self.direction]}, {self.statistic} = {self.value:g}, "
                f"micro-batches {list(self.micro_batches)}"
            )
        of_part = "" if self.part is None else f" of part {self.part}"
        return (
            f"{self.worker} sent {DIRECTIONS[self.direction]} messages outside the fences over link {self.link}: "
            f"{self.statistic}{of_part} = {self.value:.6g}, score {self.score:.3g} (1 is on the fence), "
            f"micro-batches {list(self.micro_batches)}{audited}"
        )


@dataclass(frozen=True)
class Dispute:
    """Two workers report different things about messages of one column.

    Attributes:
        direction, link, column: where the messages crossed.
        sender, receiver: who contradict each other: the two ends of the link, or the two neighbours of ``about``.
        about: None where the ends of the link differ in what crossed it; else the worker whose neighbours differ in
            what entered it and left it.
        micro_batches: which messages.
        audit: "refuted" where the two agree, accuse ``about``, and an audit found it untrue; else empty.
    """

    direction: int
    link: int
    column: int
    sender: Worker
    receiver: Worker
    about: Worker | None
    micro_batches: tuple[int, ...]
    audit: str = ""

    def __str__(self) -> str:
        if self.audit:
            return (
                f"audit {self.audit} what {self.sender} and {self.receiver} report of what entered and left "
                f"{self.about} {DIRECTIONS[self.direction]}, micro-batches {list(self.micro_batches)}: one of the two "
                "lies or errs"
            )
        if self.about:
            return (
                f"{self.sender} and {self.receiver} report different things about what entered and left {self.about} "
                f"{DIRECTIONS[self.direction]}, micro-batches {list(self.micro_batches)}: one of the two lies or errs"
            )
        return (
            f"{self.sender} and {self.receiver} report different things about {DIRECTIONS[self.direction]} "
            f"messages over link {self.link}, micro-batches {list(self.micro_batches)}: corrupted in transit, "
            "or one of the two lies"
        )


@dataclass(frozen=True)
class Verdict:
    """The judgement of one step. Arrays follow the axes [direction, link, column, micro-batch].

    Attributes:
        step: the engine's global step.
        warming_up: the fences are still learning; only non-finite messages and disputes count.
        judged: number of messages held against the fences.
        scores: float64, a message's largest score over its statistics; 1 is on the fence.
        alarms: bool, messages outside the fences, the cascade included.
        disputes: bool, messages whose two ends disagree.
        worker_scores: float64 [S, R], the largest score of what each worker sent.
        suspected: bool [C], columns with an alarm or a dispute in this step.
        excluded: bool [C], columns to leave out of this step's reduction.
        convicted: bool [S, R], after this step.
        findings, disputed: who is to blame for what, worst first.
        newly_convicted, released: changes of the record in this step.
        skip: no column is left; the optimizer must not step.
        halt: why training must stop, or None.
    """

    step: int
    warming_up: bool
    judged: int
    scores: np.ndarray
    alarms: np.ndarray
    disputes: np.ndarray
    worker_scores: np.ndarray
    suspected: np.ndarray
    excluded: np.ndarray
    convicted: np.ndarray
    findings: tuple[Finding, ...]
    disputed: tuple[Dispute, ...]
    newly_convicted: tuple[Worker, ...]
    released: tuple[Worker, ...]
    skip: bool
    halt: str | None

    def digest(self) -> int:
        """A checksum of everything that ranks must agree on: all that is decided, and scores on a coarse grid.

        Scores decide nothing any more. They are there so that a rank whose state is another one (memory that fails,
        another checkpoint) is found before it decides otherwise.
        """
        crc = zlib.crc32(f"{self.step} {self.warming_up} {self.skip} {self.halt}".encode())
        suspects = [
            (one.worker, one.direction, one.link, one.column, one.micro_batches, one.rests_on_pair, one.telling)
            for one in self.findings
        ]
        disputed = [
            (one.direction, one.link, one.column, one.sender, one.receiver, one.about, one.micro_batches)
            for one in self.disputed
        ]
        crc = zlib.crc32(str((suspects, disputed, self.newly_convicted, self.released)).encode(), crc)
        scores = np.rint(np.fmin(self.scores, _LARGEST_SCORE) * _SCORE_GRID).astype(np.int64)
        for array in (scores, self.alarms, self.disputes, self.excluded, self.convicted):
            crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
        return crc
