"""What a step's judgement says."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from deepspeed_sentinel.evidence.table import in_words
from deepspeed_sentinel.judgement.trial import Difference, Proof
from deepspeed_sentinel.judgement.unsettled import Contradicted
from deepspeed_sentinel.mesh import DIRECTIONS, Worker

_SCORE_GRID, _LARGEST_SCORE = 64.0, 1e6
_NOT_FENCED = {
    "passed_on": "other tensors than entered it, {:g} of those that it always passed on unchanged",
    "from_nothing": "a gradient that it made from one that was zero",
}


NOBODY = np.zeros(0, bool)
Cause = Literal["fences", "sums", "later alarms"]


@dataclass(frozen=True)
class Finding:
    """A suspect of this step: the worker that the blame rule points at, and the worst of what points at it.

    Attributes:
        worker: who produced the messages.
        direction, link, column: where they crossed.
        micro_batches: which of its messages are alarms and first on their micro-batch's way, or conspicuous before
            later alarms.
        striking: those of them that tell against the worker. Without any there is no strike: something before them, or
            loss scaling, may explain them.
        micro_batch: the worst of those that strike, or else of all.
        cause: why that one is among them: it is outside the fences; its sender's deviations have added up to the
            limit; or later alarms were traced back to it, which is in no alarm itself.
        statistic: the row of the table that is furthest outside.
        value: that statistic as reported, in its own unit.
        residual, low, high: what was compared and its fences, in the compared unit.
        score: distance from the nearer quartile over the fence's; above 1 is outside. Infinite for a hard row.
        trusted: the worker is in the first or last stage and never convicted: suspect hardware or data.
        overflow: fp16 loss scaling may explain that one, a non-finite gradient.
        excuse: what else explains that one: "content" of a kind that the other replicas do not have; "turn", where most
            replicas have changed of late in all that it is in alarm for; "doubted", where the two ends of the link
            differ in all that accuses; or "alone", where there is one replica and a change of training cannot be told
            from an attack.
        but_for_pair: without the statistics of the pair content would explain it.
        rests_on_pair, telling: see ``Grounds``; what rests on a pair is what the worker's neighbours say of it.
        audit: what an audit found, "confirmed" or "open" (no strike); empty without one.
        part: which judged part of the message that statistic is of, from 0; None where messages have but one.
    """

    worker: Worker
    direction: int
    link: int
    column: int
    micro_batches: tuple[int, ...]
    striking: tuple[int, ...]
    micro_batch: int
    cause: Cause
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
    excuse: Literal["", "content", "alone", "doubted", "turn"] = ""
    but_for_pair: bool = False
    audit: str = ""
    part: int | None = None

    @property
    def strikes(self) -> bool:
        """It counts against the worker, as far as no audit objects."""
        return bool(self.striking) and self.audit != "open"

    def __str__(self) -> str:
        sent = f"{self.worker} sent {DIRECTIONS[self.direction]} messages"
        of_part = "" if self.part is None else f" of part {self.part}"
        meaning = in_words(self.statistic).removeprefix(self.statistic)
        measured = f"{self.statistic}{of_part} = {self.value:.6g}{meaning}, score {self.score:.3g}"
        if self.statistic in _NOT_FENCED:
            what = _NOT_FENCED[self.statistic].format(self.value)
            return (
                f"{self.worker} sent over link {self.link} {what}: {DIRECTIONS[self.direction]}, "
                f"{self.statistic} = {self.value:g}, micro-batches {list(self.micro_batches)}{self._in_its_favour()}"
            )
        told = {
            "fences": f"{sent} outside the fences over link {self.link}: {measured} (1 is on the fence)",
            "sums": f"{sent} over link {self.link} whose deviations have added up: {measured} (1 is the limit)",
            "later alarms": f"{sent} over link {self.link}, inside the fences, to which alarms behind them are traced "
            f"back: {measured} (1 is on the fence)",
        }[self.cause]
        return f"{told}, micro-batches {list(self.micro_batches)}{self._in_its_favour()}"

    def _in_its_favour(self) -> str:
        if self.audit:
            return f", audit {self.audit}{'' if self.strikes else ': no strike'}"
        if self.strikes:
            return ""
        if self.overflow:
            return ", loss scaling may explain it: no strike"
        if self.statistic == "from_nothing":
            return ", it is not known whether its stage adds a gradient of its own: no strike"
        if self.excuse == "content":
            return ", content that the other replicas do not have explains it: no strike"
        if self.excuse == "doubted":
            return ", of which the two ends of the link report different numbers: no strike"
        if self.excuse == "alone":
            return ", one replica has nothing to compare with: no strike"
        if self.excuse == "turn":
            return ", most replicas have changed in this of late: no strike"
        if self.cause == "later alarms":
            return ", in no alarm of its own: no strike"
        return ", conspicuous work before it may explain it: no strike"


@dataclass(frozen=True)
class Dispute:
    """Two workers report different things about messages of one column.

    Attributes:
        direction, link, column: where the messages crossed.
        sender, receiver: who contradict each other: the two ends of the link, or the two neighbours of ``about``.
        about: None where the ends of the link differ in what crossed it; else the worker whose neighbours differ in
            what entered it and left it.
        micro_batches: which messages.
        audit: where the two agree and accuse ``about``, what an audit of it found: "refuted", it is untrue; "false",
            one of the two handed in what is no statement, or another message than it had reported; "unheard", one of
            the two handed in nothing. Else empty.
        at_fault: which of the two; "false" is a strike against it.
    """

    direction: int
    link: int
    column: int
    sender: Worker
    receiver: Worker
    about: Worker | None
    micro_batches: tuple[int, ...]
    audit: str = ""
    at_fault: Worker | None = None

    @property
    def struck(self) -> Worker | None:
        """Who gets a strike by it."""
        return self.at_fault if self.audit == "false" else None

    def __str__(self) -> str:
        if self.at_fault:
            did = {"false": "a false statement", "unheard": "nothing in time"}[self.audit]
            return (
                f"{self.at_fault} gave the auditor {did} of what it reported beside {self.about} "
                f"{DIRECTIONS[self.direction]}, micro-batches {list(self.micro_batches)}: what it says of {self.about} "
                "does not count"
            )
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
        skip: no column is left, or most replicas of a stage overflow; the optimizer must not step.
        overflow: it is skipped because of gradients that loss scaling may explain: the scale must come down.
        halt: why training must stop, or None.
        twins: it is a twin step.
        alike: bool [S], in a twin step, stages all of whose included replicas have accumulated the same gradients.
        suspects: bool [S, R], workers to be tried, after this step, see ``Record.suspects``.
        proofs, differences: what a twin step has shown.
        inexact: who made other bits in it, as another kind of hardware does.
        contradicted: who is convicted because it contradicts too many.
        unsettled: two by two, of whom one must be bad by what this step has shown, and nobody can tell which.
        cleared: suspects that a twin step has cleared.
        isolated: bool [S, R], who is kept where columns are lost, unproved (``isolation.py``), after this step.
        wiring: int64 [S, C], of the next step; None where nobody deals.
        action: by which it was judged, see ``JudgeSettings``.
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
    overflow: bool
    halt: str | None
    suspects: np.ndarray
    twins: bool = False
    alike: np.ndarray = field(default_factory=lambda: NOBODY)
    proofs: tuple[Proof, ...] = ()
    differences: tuple[Difference, ...] = ()
    inexact: tuple[Worker, ...] = ()
    contradicted: tuple[Contradicted, ...] = ()
    unsettled: tuple[tuple[Worker, Worker], ...] = ()
    cleared: tuple[Worker, ...] = ()
    isolated: np.ndarray = field(default_factory=lambda: NOBODY)
    wiring: np.ndarray | None = None
    action: str = ""

    @property
    def proved(self) -> tuple[Worker, ...]:
        """Whom this step shows to be bad by more than statistics, in messages: by comparison or by contradiction."""
        return (*(one.worker for one in self.proofs), *(one.worker for one in self.contradicted))

    def digest(self) -> int:
        """A checksum of everything that ranks must agree on: all that is decided, and scores on a coarse grid.

        Scores decide nothing any more. They are there so that a rank whose state is another one (memory that fails,
        another checkpoint) is found before it decides otherwise.
        """
        step = (self.step, self.warming_up, self.twins, self.skip, self.overflow, self.halt, self.action)
        crc = zlib.crc32(str(step).encode())
        suspects = [
            (
                one.worker,
                one.direction,
                one.link,
                one.column,
                one.micro_batches,
                one.striking,
                one.rests_on_pair,
                one.telling,
            )
            for one in self.findings
        ]
        disputed = [
            (one.direction, one.link, one.column, one.sender, one.receiver, one.about, one.micro_batches)
            for one in self.disputed
        ]
        changes = (self.newly_convicted, self.released, self.cleared)
        shown = (self.proofs, self.differences, self.inexact, self.contradicted)
        crc = zlib.crc32(str((suspects, disputed, *shown, changes)).encode(), crc)
        scores = np.rint(np.fmin(self.scores, _LARGEST_SCORE) * _SCORE_GRID).astype(np.int64)
        decided = [scores, self.alarms, self.disputes, self.excluded, self.convicted, self.suspects]
        for array in decided if self.wiring is None else [*decided, self.wiring]:
            crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
        return crc
