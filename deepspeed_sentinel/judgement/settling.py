"""What is known of workers, step by step: who is suspected, at odds with others, isolated and convicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.judgement.account import entries
from deepspeed_sentinel.judgement.blame import Blame
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.judgement.excuses import Judged
from deepspeed_sentinel.judgement.heard import Heard
from deepspeed_sentinel.judgement.isolation import Isolation, involved
from deepspeed_sentinel.judgement.passing import leaving
from deepspeed_sentinel.judgement.proof import tried
from deepspeed_sentinel.judgement.record import Changes, Record
from deepspeed_sentinel.judgement.settings import JudgeSettings
from deepspeed_sentinel.judgement.trial import Trial
from deepspeed_sentinel.judgement.unsettled import Contradicted, Unsettled
from deepspeed_sentinel.judgement.verdict import Dispute, Finding
from deepspeed_sentinel.mesh import Mesh, Worker

_PATIENCE = 4  # of the time for which a strike makes a suspect: who it was is found out in that


@dataclass(frozen=True)
class Settled:
    """What a step has changed in what is known of workers.

    Attributes:
        changes: of the record.
        contradicted: who contradicts too many.
        news: there is something to act on that was not there before, but for new suspects.
    """

    changes: Changes
    contradicted: tuple[Contradicted, ...]
    news: bool


class Settling:
    """Enters each step into what is known of workers.

    Attributes:
        record: strikes, suspicion, convictions and probation.
        unsettled: two by two, of whom one must be bad.
        isolation: who is kept where columns are lost, unproved.
    """

    def __init__(self, mesh: Mesh, settings: JudgeSettings) -> None:
        self._mesh = mesh
        heals = settings.wiring == "heal" and settings.action != "observe"
        self.unsettled = Unsettled(mesh, settings.probation_steps)
        self.isolation = Isolation(mesh, settings.probation_steps, _PATIENCE * settings.strike_window, heals)
        self.record = Record(
            mesh,
            settings.strikes,
            settings.strike_window,
            settings.probation_steps,
            by_proof=settings.conviction == "proof",
            heals=heals,
        )

    @property
    def doubts(self) -> Doubts:
        """What the next wiring is made of, after the last step."""
        convicted, suspects = self.record.convicted, self.record.suspects
        suspects[[0, -1]] = False
        # Trials come first: in a stage with a suspect the places in lost columns are for those that it is compared with
        # in turn. When all is settled there, who is isolated is packed again.
        isolated = self.isolation.isolated & ~suspects.any(1, keepdims=True)
        untried = self.record.untried & ~isolated
        accused = self.record.accused & suspects
        pairs = self.unsettled.pairs(convicted)
        return Doubts(convicted | isolated, suspects, accused, untried, pairs, self.isolation.isolated)

    def step(
        self,
        evidence: Evidence,
        heard: Heard,
        trial: Trial | None,
        alarms: np.ndarray,
        judged: Judged,
        blame: Blame,
        findings: tuple[Finding, ...],
        disputed: tuple[Dispute, ...],
        proved: tuple[Worker, ...],
    ) -> Settled:
        """Enter a step into what is known of workers: who is suspected, proved, isolated or cleared after it."""
        served, facts = evidence.served, heard.facts
        by_several = self.unsettled.step(
            served,
            np.asarray(facts.any(-1)),
            np.asarray(heard.said.by_neighbours.any(-1)),
            trial,
            self.record.convicted,
        )
        proved = (*proved, *(one.worker for one in by_several))
        changes = self.record.update(
            *entries(self._mesh, findings, disputed),
            tried(self._mesh, trial, proved) if trial or proved else None,
            evidence.refused,
            self.unsettled.doubted,
            self.isolation.beside(served),
        )
        unproved = ((heard.said.by_ends | (alarms & judged.doubted)) & ~facts).any((0, 3))
        silent = leaving(np.asarray(heard.silent.any(-1))).any(0)
        between = np.zeros((0, *changes.cleared.shape), bool)
        if trial:
            between = np.concatenate([trial.open, self.unsettled.uncounted(trial)])
        unblamed = (alarms & ~judged.excused).any((0, 1, 3)) & ~(blame.strikes | heard.disputes).any((0, 1, 3))
        self.isolation.step(
            served,
            involved(np.asarray(unproved), np.asarray(silent)),
            between,
            np.asarray(unblamed & (evidence.twins is None)),
            [(one.worker, one.column) for one in findings if one.strikes and one.rests_on_pair],
            changes.cleared,
            self.record.convicted,
            bool((changes.convicted | changes.released).any()),
        )
        news = bool(changes.convicted.any() or self.unsettled.news or self.isolation.news)
        return Settled(changes, by_several, news)

    def forget(self, worker: Worker) -> None:
        """Hold nothing against a worker, since another machine is in its place."""
        self.record.forget(worker)
        self.unsettled.forget(worker)
        self.isolation.forget(worker)
