"""What was found, as events: from verdicts, wirings, compared weights, reductions and devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from deepspeed_sentinel.evidence.weights import Comparison, Division
from deepspeed_sentinel.judgement.verdict import NOBODY, Verdict
from deepspeed_sentinel.mesh import DIRECTIONS, columns_of, workers_of
from deepspeed_sentinel.telemetry import events
from deepspeed_sentinel.telemetry.book import COLUMNS
from deepspeed_sentinel.telemetry.events import Event
from deepspeed_sentinel.telemetry.exclusion import proved, reason
from deepspeed_sentinel.telemetry.standing import Above, Standing
from deepspeed_sentinel.telemetry.suspicion import suspicion
from deepspeed_sentinel.telemetry.who import Who


def verdict_events(
    verdict: Verdict, every_step: bool, suspected: np.ndarray, who: Who, isolated: np.ndarray = NOBODY
) -> Iterator[Event]:
    """The events of one step, in the order in which things happen.

    Args:
        verdict: of the step.
        every_step: whether there is one where nothing was found.
        suspected: bool [S, R], who was a suspect before it.
        who: names the workers in words.
        isolated: bool [S, R], who was isolated before it.
    """
    if every_step:
        yield events.Step(
            np.round(np.nan_to_num(verdict.worker_scores, posinf=1e9), 4).tolist(),
            np.flatnonzero(verdict.excluded).tolist(),
            verdict.warming_up,
        )
    for finding in verdict.findings:
        yield events.Alarm(
            *finding.worker,
            direction=DIRECTIONS[finding.direction],
            link=finding.link,
            micro_batches=list(finding.micro_batches),
            statistic=finding.statistic,
            value=finding.value,
            residual=finding.residual,
            low=finding.low,
            high=finding.high,
            score=min(finding.score, 1e9),
            trusted=finding.trusted,
            overflow=finding.overflow,
            cause=finding.cause,
            strikes=finding.strikes,
            audit=finding.audit or None,
        )
    for dispute in verdict.disputed:
        yield events.Disputed(
            link=dispute.link,
            direction=DIRECTIONS[dispute.direction],
            column=dispute.column,
            sender=dispute.sender,
            receiver=dispute.receiver,
            about=dispute.about,
            micro_batches=list(dispute.micro_batches),
            audit=dispute.audit or None,
            at_fault=dispute.at_fault,
        )
    if verdict.excluded.any():
        yield events.Excluded(np.flatnonzero(verdict.excluded).tolist())
    for worker in workers_of(verdict.suspects & ~suspected):
        yield events.Suspicion(*worker, why=who.fill(suspicion(verdict, worker)))
    if verdict.twins:
        yield events.TwinStep(workers_of(verdict.suspects), verdict.inexact)
    for proof in verdict.proofs:
        yield events.Proved(
            *proof.worker,
            column=proof.column,
            of=_of(proof.direction),
            micro_batches=list(proof.micro_batches),
            agreeing=proof.agreeing,
            compared=proof.compared,
            trusted=proof.trusted,
        )
    for one in verdict.contradicted:
        yield events.Contradiction(*one.worker, partners=one.partners)
    for difference in verdict.differences:
        yield events.Differing(difference.workers, _of(difference.direction), difference.as_received)
    for worker in verdict.cleared:
        yield events.Cleared(*worker)
    for worker in verdict.newly_convicted:
        yield events.Conviction(*worker, why=who.fill(reason(verdict, worker)), proved=proved(verdict, worker))
    for worker in verdict.released:
        yield events.Release(*worker)
    if workers_of(verdict.isolated) != workers_of(isolated):
        yield events.Isolated(workers_of(verdict.isolated))
    if verdict.skip:
        yield events.Skipped()
    if verdict.halt:
        yield events.Halt(who.fill(verdict.halt))


def wiring_event(before: np.ndarray, wiring: np.ndarray) -> events.Dealt:
    """Who serves another column from a step on.

    Args:
        before, wiring: int64 [S, C].
    """
    left, now = columns_of(before), columns_of(wiring)
    moved = workers_of(left != now)
    return events.Dealt([[*worker, int(left[worker]), int(now[worker])] for worker in moved])


def weights_events(comparison: Comparison, found: Iterable[Division], action: str) -> Iterator[events.Weights]:
    """One event for each worker that held other weights than most, then one for each stage without a majority.

    Args:
        comparison: what it came to.
        found: the stages whose replicas differ.
        action: "healed", "unhealed" (it was tried), "reported" (with action observe) or "stopped".
    """
    for worker in comparison.unequal:
        yield events.Weights(*worker, action=action)
    for one in found:
        if one.stage in comparison.undecided:
            yield events.Weights(one.stage, None, action, [list(group) for group in one.groups])


def device_event(what: Standing | Above) -> events.DeviceNote:
    """A device that people should look at.

    Args:
        what: a device with a proof behind it, or one whose rate of alarms lies above its peers'.
    """
    rate = what if isinstance(what, Above) else None
    one = what.standing if isinstance(what, Above) else what
    counts: dict[str, Any] = {name: getattr(one, name) for name in COLUMNS}
    return events.DeviceNote(
        why="rate" if rate else "proof",
        device=one.key,
        place=one.place,
        workers=one.workers,
        **counts,
        peers=rate.peers if rate else None,
        chance=rate.chance if rate else None,
    )


def _of(direction: int | None) -> str:
    return "gradients" if direction is None else DIRECTIONS[direction]
