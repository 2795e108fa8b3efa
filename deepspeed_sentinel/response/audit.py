"""The audit: a trusted worker looks again at what two neighbours report of the stage between, before it counts.

Statistics of a pair are of two sketches, one by each neighbour, and both report the same rows. If one of the two lies
in its sketch, the rows still agree and the honest stage between looks guilty. So each neighbour keeps one secretly
chosen message whole (``evidence.keeping``), and a finding that rests on a pair is a strike only if the row of that
micro-batch, computed anew, is the one that was reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from deepspeed_sentinel.evidence.keeping import SecondLook, look_again
from deepspeed_sentinel.evidence.parts import Layout
from deepspeed_sentinel.evidence.probe import End
from deepspeed_sentinel.evidence.statement import Statement
from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import FLOORS, OF_PAIR, RECEIVED, SENT, TABLE, comparable
from deepspeed_sentinel.evidence.transfer import PAIR_ROWS, Known, Sketches, pair_rows
from deepspeed_sentinel.judgement.verdict import Dispute, Finding, Verdict
from deepspeed_sentinel.kernels.token_sketch import sketch_rows
from deepspeed_sentinel.mesh import FORWARD, Worker
from deepspeed_sentinel.telemetry import console

# float32 rounding, which differs from device to device; a row may also differ by its floor in the compared unit.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
# The neighbours solve for the map on devices of their own. In shares of its largest entry.
MAP_TOLERANCE = 1e-2
_NO_ROOM = (MemoryError, torch.OutOfMemoryError)  # the auditor's own want
P = ParamSpec("P")
T = TypeVar("T")


class Outcome(Enum):
    """What an audit found."""

    CONFIRMED = "confirmed"  # the row is true
    REFUTED = "refuted"  # it is not, or a message is not the one that crossed: somebody beside the stage lies
    OPEN = "open"  # true, but it says nothing about those messages that accuse
    # Of one witness: what it handed in is no statement, or not the message that it reported itself.
    FIRST_FALSE, SECOND_FALSE = "first false", "second false"
    # Of one witness: nothing came in time. The network between it and the auditor can be why.
    FIRST_UNHEARD, SECOND_UNHEARD = "first unheard", "second unheard"

    @staticmethod
    def of_witness(index: int, false: bool) -> Outcome:
        """The outcome that names the first (0) or second (1) witness."""
        return (_FALSE if false else _UNHEARD)[index]


_FALSE = (Outcome.FIRST_FALSE, Outcome.SECOND_FALSE)
_UNHEARD = (Outcome.FIRST_UNHEARD, Outcome.SECOND_UNHEARD)


@dataclass(frozen=True)
class Audit:
    """One accusation to look into.

    Attributes:
        finding: the accusation.
        first, second: the neighbours that observed the messages on their way into the accused worker and out of it.
        auditor: who looks.
    """

    finding: Finding
    first: Worker
    second: Worker
    auditor: Worker

    @property
    def witnesses(self) -> tuple[tuple[Worker, End], tuple[Worker, End]]:
        """The neighbours, and at which end each observed."""
        direction = self.finding.direction
        return (self.first, (direction, SENT)), (self.second, (direction, RECEIVED))

    def witness_at_fault(self, outcome: Outcome) -> Worker | None:
        """Whom this outcome names, if it names one of the two."""
        for index, witness in enumerate((self.first, self.second)):
            if outcome in (_FALSE[index], _UNHEARD[index]):
                return witness
        return None


def audits_due(verdict: Verdict, evidence: Evidence) -> tuple[Audit, ...]:
    """What to audit before the strikes of this verdict count: one finding a worker, the worst.

    No audit is needed of a trusted or a convicted worker, which gets no strike or needs none, nor where another finding
    about the worker stands without pairs, nor where both neighbours are trusted.

    The auditor is the trusted worker of the column that is nearer to the accused: it is a neighbour wherever a
    neighbour is trusted, so fewer tensors travel, and both ends of the pipeline share the work.
    """
    mesh, served = evidence.mesh, evidence.served
    standing = {finding.worker for finding in verdict.findings if finding.strikes and not finding.rests_on_pair}
    audits: dict[Worker, Audit] = {}
    for finding in verdict.findings:
        worker, column = finding.worker, finding.column
        convicted_before = verdict.convicted[worker] and worker not in verdict.newly_convicted
        if not (finding.strikes and finding.rests_on_pair) or worker in standing or worker in audits:
            continue
        if finding.trusted or convicted_before or mesh.neighbours_are_trusted(worker.stage):
            continue
        before = worker.stage + (-1 if finding.direction == FORWARD else 1)
        after = 2 * worker.stage - before
        nearer = 0 if 2 * worker.stage <= mesh.stages - 1 else mesh.stages - 1
        first, second, auditor = (Worker(stage, int(served[stage, column])) for stage in (before, after, nearer))
        audits[worker] = Audit(finding, first, second, auditor)
    return tuple(audits.values())


def examine(
    audit: Audit,
    evidence: Evidence,
    first: Statement,
    second: Statement,
    layout: Layout,
    device: torch.device,
    say: Callable[[str], None] = console.say,
) -> Outcome:
    """Hold what the two neighbours kept against what they reported in the evidence.

    A message that is none, or without the checksums that its own witness reported, names the witness; where the two
    contradict each other, or both report untrue rows (which either's sketch may have made so), it is between them. What
    cannot be looked at is no message.

    Args:
        audit: the accusation.
        evidence: of the step.
        first, second: statements of the neighbours, tensors on ``device``.
        layout: what messages are made of.
        device: of this worker.
        say: gets a line about what cannot be looked at.
    """
    finding, mesh = audit.finding, evidence.mesh
    for index, statement in enumerate((first, second)):
        if len(statement.known) != layout.parts or statement.micro_batch >= evidence.digests.shape[-2]:
            return Outcome.of_witness(index, false=True)
    if first.micro_batch != second.micro_batch or first.seeds != second.seeds:
        return Outcome.REFUTED
    if not all(map(_same, first.known, second.known)):
        return Outcome.REFUTED
    looks = []
    entered = finding.link + (-1 if finding.direction == FORWARD else 1)
    for index, (statement, (worker, end), link) in enumerate(
        zip((first, second), audit.witnesses, (entered, finding.link), strict=True)
    ):
        sent, received = evidence.digests[:, finding.direction, link, finding.column, first.micro_batch]
        if (sent != received).any():
            # A dispute of its own, which leaves nothing to hold the kept message against.
            return Outcome.OPEN
        look = _of_strangers(f"{worker}", say, look_again, statement, end, worker.stage, mesh, layout, device)
        if isinstance(look, _NO_ROOM):
            return Outcome.of_witness(index, false=False)
        if not isinstance(look, SecondLook) or (look.digests != sent).any():
            return Outcome.of_witness(index, false=True)
        looks.append(look)
    both = f"{audit.first} and {audit.second}"
    if _of_strangers(both, say, _rows_are_true, audit, evidence, (first, second), looks) is not True:
        return Outcome.REFUTED
    return Outcome.CONFIRMED if first.micro_batch in finding.telling else Outcome.OPEN


def _of_strangers(
    whose: str, say: Callable[[str], None], look: Callable[P, T], *given: P.args, **more: P.kwargs
) -> T | Exception:
    """What is found in values that others handed in, or why nothing can be, which is logged.

    Whatever is wrong with them is a fault of who handed them in and must not end the auditor, and with it the run. So
    any error is caught here, and nowhere else.
    """
    try:
        return look(*given, **more)
    except Exception as error:
        say(f"what {whose} handed in for an audit cannot be looked at: {type(error).__name__}: {error}")
        return error


def _rows_are_true(
    audit: Audit, evidence: Evidence, statements: Sequence[Statement], looks: Sequence[SecondLook]
) -> bool:
    """Each neighbour reports the rows, as it measured them, of every part."""
    finding, micro_batch = audit.finding, statements[0].micro_batch
    reported = evidence.statistics[:, finding.direction, finding.link, finding.column, micro_batch].astype(np.float64)
    by_part = reported.reshape(2, -1, len(TABLE))
    for part, (entered, left) in enumerate(zip(*(look.tokens for look in looks), strict=True)):
        for end, statement in zip((SENT, RECEIVED), statements, strict=True):
            found = np.full(PAIR_ROWS, np.nan)
            if entered == left > 0:
                rows = sketch_rows(entered)
                entering, leaving = (look.sketches[part].first(rows) for look in looks)
                found = _row(entering, leaving, statement.known[part])
            if not _close(by_part[end, part], found):
                return False
    return True


def _row(entering: Sketches, leaving: Sketches, known: Known | None) -> np.ndarray:
    rows_1S, _ = pair_rows(entering, leaving, known)
    return rows_1S[0].cpu().numpy().astype(np.float64)


def _close(reported: np.ndarray, found: np.ndarray) -> bool:
    """Whether the row of a whole part (float64 [len(TABLE)]) holds these statistics of its pair."""
    whole = np.where(OF_PAIR, 0.0, reported)
    whole[OF_PAIR] = found
    by_value = np.isclose(reported, whole, equal_nan=True, **ROUNDING)
    with np.errstate(invalid="ignore"):
        in_unit = np.abs(comparable(reported[:, None]) - comparable(whole[:, None]))[:, 0] <= FLOORS
    return bool((by_value | in_unit)[OF_PAIR].all())


def _same(one: Known | None, other: Known | None) -> bool:
    if one is None or other is None:
        return one is other
    for mine, theirs in ((one.expected_K, other.expected_K), (one.w_KK, other.w_KK)):
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            return False
        if not bool(((mine - theirs).abs() <= MAP_TOLERANCE * mine.abs().max()).all()):
            return False
    return True


@dataclass(frozen=True)
class Ruling:
    """A verdict as amended by its audits, for ``Judge.retract``.

    Attributes:
        verdict: findings say what the audit found; those refuted are disputes instead, and content again where nothing
            but the pair spoke against that.
        opened, refuted: the findings, as they now stand or stood, whose strikes must be taken back.
    """

    verdict: Verdict
    opened: tuple[Finding, ...]
    refuted: tuple[Finding, ...]


def rule(verdict: Verdict, audits: Sequence[Audit], outcomes: Sequence[Outcome]) -> Ruling:
    """What becomes of each finding. All that rest on the same worker's pair share the outcome of the one audited."""
    found = {audit.finding.worker: (audit, outcome) for audit, outcome in zip(audits, outcomes, strict=True)}
    findings, opened, refuted, disputed = [], [], [], list(verdict.disputed)
    for finding in verdict.findings:
        if finding.worker not in found or not finding.rests_on_pair:
            findings.append(finding)
            continue
        audit, outcome = found[finding.worker]
        if outcome not in (Outcome.CONFIRMED, Outcome.OPEN):
            refuted.append(finding)
            disputed.append(_dispute(audit, finding, outcome))
            if finding.but_for_pair:
                findings.append(replace(finding, striking=(), excuse="content", rests_on_pair=False))
            continue
        if outcome is Outcome.OPEN or finding is audit.finding:
            finding = replace(finding, audit=outcome.value)
        if outcome is Outcome.OPEN:
            opened.append(finding)
        findings.append(finding)
    amended = replace(verdict, findings=tuple(findings), disputed=tuple(disputed))
    return Ruling(amended, tuple(opened), tuple(refuted))


def _dispute(audit: Audit, finding: Finding, outcome: Outcome) -> Dispute:
    same_way = finding.direction == audit.finding.direction
    sender, receiver = (audit.first, audit.second) if same_way else (audit.second, audit.first)
    return Dispute(
        direction=finding.direction,
        link=finding.link,
        column=finding.column,
        sender=sender,
        receiver=receiver,
        about=finding.worker,
        micro_batches=finding.micro_batches,
        audit=outcome.value.split()[-1],
        at_fault=audit.witness_at_fault(outcome),
    )
