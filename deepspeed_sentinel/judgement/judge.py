"""The judge: evidence of a step in, verdict out. The same evidence and state give the same verdict, bit for bit.

In a twin step all columns have the same data, and what a majority of a stage makes of it decides (``proof.py``).
Statistics speak where nothing could be compared, and nothing is learnt but where training is (``centre.py``): the
others' messages are no example.

The combination rule: a message is an alarm if any one of its statistics lies outside that statistic's own fence, or if
the deviations of its sender in any one statistic have added up to the limit. The statistics share the permitted rate
of false alarms equally.

The way of a step, each line a file: what both ends tell is heard (``heard.py``) and measured (``measuring.py``); a
twin step is tried (``proof.py``); alarms have excuses (``excuses.py``) or a culprit (``blame.py``); the record says who
is suspected and convicted (``settling.py``); then columns are left out, and what is
clean (``clean.py``) is learnt from.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import RECEIVED, Rows
from deepspeed_sentinel.judgement.account import Account, entries
from deepspeed_sentinel.judgement.blame import Blame
from deepspeed_sentinel.judgement.clean import clean_links
from deepspeed_sentinel.judgement.deadlock import Deadlock
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.judgement.excuses import Judged
from deepspeed_sentinel.judgement.halt import halt_reason
from deepspeed_sentinel.judgement.heard import Heard, Hearing
from deepspeed_sentinel.judgement.measuring import Measuring
from deepspeed_sentinel.judgement.nothing import Nothing
from deepspeed_sentinel.judgement.overflow import Explained, Overflow
from deepspeed_sentinel.judgement.passing import Passing
from deepspeed_sentinel.judgement.proof import try_twins
from deepspeed_sentinel.judgement.replay import Replayed
from deepspeed_sentinel.judgement.settings import JudgeSettings as JudgeSettings
from deepspeed_sentinel.judgement.settling import Settling
from deepspeed_sentinel.judgement.silence import Silence
from deepspeed_sentinel.judgement.state import problem
from deepspeed_sentinel.judgement.trial import Trial
from deepspeed_sentinel.judgement.verdict import NOBODY, Finding, Verdict
from deepspeed_sentinel.mesh import Mesh, Worker, identity, workers_of

# what has a state of its own
_KEPT = (
    *("fences", "content", "cusum", "standing", "record", "unsettled"),
    *("isolation", "passing", "nothing", "silence", "overflow", "deadlock"),
)


class Judge:
    """Turns the evidence of successive steps into verdicts and learns from what was clean.

    Args:
        mesh: the mesh judged.
        settings: how to judge.
        parts: judged parts of a message; its evidence must have as many.

    Attributes:
        table: the rows judged.
        clean_links: bool [2, L, C], whose messages of the last step baselines may learn from.
    """

    def __init__(self, mesh: Mesh, settings: JudgeSettings, parts: int = 1) -> None:
        self.mesh = mesh
        self.settings = settings
        self.table = Rows(parts)
        self._measuring = Measuring(mesh, settings, self.table)
        self.fences, self.cusum = self._measuring.fences, self._measuring.cusum
        self.content, self.standing = self._measuring.content, self._measuring.standing
        self.passing = Passing(mesh, settings.warmup_steps)
        self.nothing = Nothing(mesh)
        self.silence = Silence(mesh, parts)
        self._hearing = Hearing(self.table, self.fences, self.passing, self.nothing, self.silence)
        self._settling = Settling(mesh, settings)
        self.record, self.unsettled = self._settling.record, self._settling.unsettled
        self.isolation = self._settling.isolation
        self.overflow = Overflow(mesh)
        self.deadlock = Deadlock(mesh, settings)
        self._served = identity(mesh)
        self.clean_links = np.zeros((2, mesh.links, mesh.replicas), bool)

    @property
    def warming_up(self) -> bool:
        return self.fences.learnt_steps < self.settings.warmup_steps

    @property
    def doubts(self) -> Doubts:
        """What the next wiring is made of, after the last step."""
        return self._settling.doubts

    def step(
        self,
        evidence: Evidence,
        overflow_limit: float = float("inf"),
        proved: Collection[Worker] = (),
        replayed: Replayed | None = None,
    ) -> Verdict:
        """Judge one step.

        Args:
            evidence: reports of both ends on every message.
            overflow_limit: the magnitude at which an honest gradient overflows under dynamic loss scaling, in
                the unit of the evidence; infinite without such scaling.
            proved: who was proved otherwise since the last step, by its weights or in a reduction.
            replayed: what a replay of this step has shown, if it was replayed.
        """
        warming_up, served, twins = self.warming_up, evidence.served, evidence.twins
        heard = self._hearing.step(evidence, warming_up)
        measured = self._measuring.step(heard, evidence, self._served, self.record.convicted, warming_up)
        if not self.deadlock.excuses:
            measured = replace(measured, turned=np.zeros_like(measured.turned))
        alarms, scores = measured.alarms, measured.scores
        explained = Explained.nothing(alarms.shape)
        if np.isfinite(overflow_limit):
            explained = self.overflow.step(heard.reports.largest, heard.hard, served, overflow_limit)
        unjudged = bool(explained.shared.any())
        if unjudged:
            alarms, scores = alarms & ~explained.shared, np.where(explained.shared, 0.0, scores)
        trial = self._try(evidence, heard, explained)
        differing = right = np.zeros(alarms.shape, bool)
        if trial:
            heard = heard.with_forged(trial.forged)
            differing, right = trial.wrong | trial.undecided, trial.right
            alarms = alarms & ~differing & (heard.hard.any(0) | ~right)
            scores = np.where(alarms, scores, 0.0)
        compares = self.fences.compares_replicas
        judged = Judged.of(alarms, scores, heard, measured, explained.overflow, right, self.table, compares)
        blame = Blame.of(alarms, heard.disputes | differing, scores, judged.excused, heard.found)
        account = Account(self.mesh, served, self.table)
        findings = account.findings(blame, judged, self.fences)
        disputed = account.disputes(blame.disputes & ~differing, heard.contradicted)
        proved = (*proved, *(replayed.inconsistent if replayed else ()))
        settled = self._settling.step(evidence, heard, trial, alarms, judged, blame, findings, disputed, proved)
        changes, suspects = settled.changes, self.record.suspects
        self._measuring.take_for_usual(
            measured.residuals, blame.strikes, changes.cleared, served, of_twins=twins is not None
        )
        events = (alarms & ~judged.alone) | heard.disputes | differing
        suspected = events.any(axis=(0, 1, 3))
        if replayed:
            suspected |= replayed.spoilt
        if twins and trial:
            suspected |= trial.spoilt | ~twins.given
        convicted = np.take_along_axis(self.record.convicted, served, 1)
        excluded = self._left_out(suspected, convicted)
        # Where loss scaling explains what most replicas did, nobody is left out, and the step is of no use.
        shared = unjudged and self.settings.action != "observe"
        skip = bool(excluded.all()) or shared
        overflow = skip and (shared or bool((alarms & explained.overflow).any()))
        lost = skip and not overflow
        self._served = np.array(served, np.int64)

        blamed = blame.named & (events | compares)
        self.clean_links = clean_links(blamed, blame.disputes, heard.contested, events, convicted)
        # In a skipped step no weight changes, and nothing has to be learnt.
        self.clean_links &= not (unjudged or skip or twins)
        self._measuring.learn(heard, measured, self.clean_links, suspected, judged.content, evidence.step)
        if twins and trial and not (unjudged or measured.alone_unlike(twins.source)):
            self.fences.learn_truth(heard.compared, trial.right & heard.whole, twins.source)
        if lost and not twins:
            self._measuring.follow(measured, judged.content)
        self.deadlock.end(lost, suspects, settled.news, bool(self.record.strikes_count.any()))
        self.record.at_a_loss = self.deadlock.here

        return Verdict(
            step=evidence.step,
            warming_up=warming_up,
            judged=0 if warming_up else int(np.count_nonzero(~explained.shared)),
            scores=scores,
            alarms=alarms,
            disputes=heard.disputes,
            worker_scores=account.worker_scores(scores),
            suspected=suspected,
            excluded=excluded,
            convicted=self.record.convicted.copy(),
            findings=findings,
            disputed=disputed,
            newly_convicted=workers_of(changes.convicted),
            released=workers_of(changes.released),
            skip=skip,
            overflow=overflow,
            halt=halt_reason(self.mesh, self.settings, self.record, self.deadlock.lost, changes.convicted),
            twins=twins is not None,
            alike=np.asarray(np.take_along_axis(trial.same, served, 1)[:, ~excluded].all(1)) if trial else NOBODY,
            suspects=suspects,
            proofs=trial.proofs if trial else (),
            differences=trial.differences if trial else (),
            inexact=trial.inexact if trial else (),
            contradicted=tuple(one for one in settled.contradicted if changes.convicted[one.worker]),
            unsettled=self.unsettled.found,
            cleared=workers_of(changes.cleared),
            isolated=self.isolation.isolated.copy(),
            action=self.settings.action,
        )

    def retract(self, verdict: Verdict, opened: tuple[Finding, ...], refuted: tuple[Finding, ...]) -> Verdict:
        """Take back strikes of the last step that no audit confirmed, and a conviction by them.

        Args:
            verdict: of that step, its findings and disputes as they should have been.
            opened: those of its findings that are no strikes.
            refuted: findings that were untrue and are disputes now; what has been added up by them goes with them.

        Returns:
            the verdict after it. What is excluded in that step stays excluded.
        """
        strikes = [finding for finding in verdict.findings if finding not in opened]
        changes = self.record.update_again(*entries(self.mesh, strikes, verdict.disputed))
        for finding in (*opened, *refuted):
            self.cusum.retract(finding.direction, finding.link, finding.worker.replica, to_zero=finding in refuted)
        for finding in refuted:
            self.isolation.clear(finding.worker, self.record.convicted)
        return replace(
            verdict,
            convicted=self.record.convicted.copy(),
            suspects=self.record.suspects,
            newly_convicted=workers_of(changes.convicted),
            released=workers_of(changes.released),
            halt=halt_reason(self.mesh, self.settings, self.record, self.deadlock.lost, changes.convicted),
            isolated=self.isolation.isolated.copy(),
        )

    def forget(self, worker: Worker) -> None:
        """Hold nothing against a worker, since another machine is in its place. What is known of columns stays."""
        marked = np.zeros((self.mesh.stages, self.mesh.replicas), bool)
        marked[worker] = True
        self._settling.forget(worker)
        self._measuring.forget(marked)

    def state_dict(self) -> dict[str, dict[str, np.ndarray] | np.ndarray]:
        return {
            **{name: getattr(self, name).state_dict() for name in _KEPT},
            "served": self._served.copy(),
        }

    def problem(self, state: object) -> str | None:
        """Why a state cannot be taken up, in words that follow "checkpoint ..."; None if it can."""
        bounded = ("fences", "cusum", "nothing", "standing", "unsettled", "isolation")
        limits = {name: getattr(self, name).limits for name in bounded}
        return problem(state, self.state_dict(), limits)

    def load_state_dict(self, state: dict) -> None:
        """Take a state up, in a new judge.

        Raises:
            ValueError: it is not one of such a judge, or spoilt.
        """
        if found := self.problem(state):
            raise ValueError(f"the state {found}")
        for name in _KEPT:
            getattr(self, name).load_state_dict(state[name])
        self._served = np.array(state["served"])
        self.record.at_a_loss = self.deadlock.here

    def _try(self, evidence: Evidence, heard: Heard, explained: Explained) -> Trial | None:
        """What a twin step shows; None if it is none."""
        if not evidence.twins:
            return None
        return try_twins(
            self.mesh,
            evidence.digests[RECEIVED],
            evidence.statistics[..., self.table.measures],
            heard.disputes | explained.shared,
            evidence.twins,
            evidence.served,
            self.record.convicted,
            self.record.accused,
            self.record.unlike,
            evidence.keyed,
            self.isolation.isolated,
        )

    def _left_out(self, suspected: np.ndarray, convicted: np.ndarray) -> np.ndarray:
        """Columns that do not count in this step, bool [C], of bool [C] and of convicted workers by column, [S, C]."""
        excluded = np.zeros_like(suspected)
        if self.settings.action != "observe":
            excluded |= suspected
        if self.settings.action == "quarantine":
            excluded |= convicted.any(0)
        return excluded
