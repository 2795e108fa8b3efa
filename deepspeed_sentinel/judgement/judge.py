"""The judge: evidence of a step in, verdict out. The same evidence and state give the same verdict, bit for bit.

In a twin step all columns have the same data, and what a majority of a stage makes of it decides (``proof.py``).
Statistics speak where nothing could be compared, and nothing is learnt: the others' messages are no example.

The combination rule: a message is an alarm if any one of its statistics lies outside that statistic's own fence, or if
the deviations of its sender in any one statistic have added up to the limit. The statistics share the permitted rate
of false alarms equally.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from deepspeed_sentinel.evidence.table import NAMES, RECEIVED, SENT, Evidence, Rows, comparable
from deepspeed_sentinel.judgement.account import Account, Judged, entries
from deepspeed_sentinel.judgement.blame import Blame, followers
from deepspeed_sentinel.judgement.cascade import hold_against_fences
from deepspeed_sentinel.judgement.clean import clean_links, sent_by
from deepspeed_sentinel.judgement.content import Content, content_alone
from deepspeed_sentinel.judgement.contradiction import Contradictions, contradictions
from deepspeed_sentinel.judgement.cusum import LEAST_REPLICAS, Cusum
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.judgement.fences import Fences
from deepspeed_sentinel.judgement.halt import halt_reason
from deepspeed_sentinel.judgement.held import Held
from deepspeed_sentinel.judgement.isolation import Isolation, involved
from deepspeed_sentinel.judgement.nothing import Nothing
from deepspeed_sentinel.judgement.overflow import Explained, Overflow
from deepspeed_sentinel.judgement.passing import Passing, leaving
from deepspeed_sentinel.judgement.proof import tried, try_twins
from deepspeed_sentinel.judgement.record import Record
from deepspeed_sentinel.judgement.replay import Replayed
from deepspeed_sentinel.judgement.reports import Reports
from deepspeed_sentinel.judgement.settings import JudgeSettings as JudgeSettings
from deepspeed_sentinel.judgement.silence import Silence
from deepspeed_sentinel.judgement.standing import Standing
from deepspeed_sentinel.judgement.state import problem
from deepspeed_sentinel.judgement.unsettled import Unsettled
from deepspeed_sentinel.judgement.verdict import NOBODY, Finding, Verdict
from deepspeed_sentinel.mesh import BACKWARD, Mesh, Worker, columns_of, identity, workers_of

_PATIENCE = 4  # of the time for which a strike makes a suspect: who it was is found out in that
# what has a state of its own
_KEPT = (
    *("fences", "content", "cusum", "standing", "record", "unsettled"),
    *("isolation", "passing", "nothing", "silence", "overflow"),
)
_PASSED_ON, _FROM_NOTHING = NAMES.index("passed_on"), NAMES.index("from_nothing")


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
        self._hard = np.flatnonzero(self.table.hard).tolist()
        # which of these the judge finds itself
        self._found = [place for place, row in enumerate(self._hard) if self.table.by_judge[row]]
        pairs = np.flatnonzero(self.table.of_pair)
        # of one part they stand in a row, and need not be copied
        self._pair_rows = slice(pairs[0], pairs[-1] + 1) if parts == 1 else pairs
        self.fences = Fences(
            mesh,
            settings.fence_window,
            settings.fence_multiplier,
            settings.target_false_positive_rate,
            settings.seed,
            self.table,
        )
        self.cusum = Cusum(mesh, settings.seed, self.table)
        self.passing = Passing(mesh, settings.warmup_steps)
        self.nothing = Nothing(mesh)
        self.silence = Silence(mesh, parts)
        self.content = Content(mesh.replicas, self.table)
        self.standing = Standing((len(self.table), 2, mesh.links, mesh.replicas), settings.strike_window)
        self.unsettled = Unsettled(mesh, settings.probation_steps)
        heals = settings.wiring == "heal" and settings.action != "observe"
        self.isolation = Isolation(mesh, settings.probation_steps, _PATIENCE * settings.strike_window, heals)
        self.record = Record(
            mesh,
            settings.strikes,
            settings.strike_window,
            settings.probation_steps,
            by_proof=settings.conviction == "proof",
            heals=heals,
        )
        self.overflow = Overflow(mesh)
        self.skipped_in_a_row = 0
        self._known = np.zeros((mesh.stages, mesh.replicas), bool)  # suspects since the last step that was not skipped
        self._served = identity(mesh)
        self.clean_links = np.zeros((2, mesh.links, mesh.replicas), bool)

    @property
    def warming_up(self) -> bool:
        return self.fences.learnt_steps < self.settings.warmup_steps

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
        return Doubts(convicted | isolated, suspects, accused, untried, self.unsettled.pairs(convicted))

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
        warming_up, served, of_pair = self.warming_up, evidence.served, self.table.of_pair
        twins = evidence.twins
        reports = Reports.of(evidence.statistics)
        nothing = self.nothing.step(reports, evidence.digests, served, warming_up)
        void = nothing.void
        values = reports.judged(self.table, void)
        hard = reports.hard
        either = hard[SENT] | hard[RECEIVED]
        compared = comparable(values)
        differ = hard[SENT] != hard[RECEIVED]
        other_digests = evidence.digests[SENT] != evidence.digests[RECEIVED]
        if other_digests.any():
            differ |= other_digests.any(-1)
        said = Contradictions.none(differ.shape, len(self.table))
        if not (warming_up or reports.alike):
            # As reported: of what is not judged, too, nobody may say other things than its partner.
            said = contradictions(reports, self.fences, self.table)
            if said.neither.any():
                values[said.neither] = compared[said.neither] = np.nan
        contradicted = differ | said.by_ends
        contradicted[BACKWARD] |= nothing.disputed
        silent = self.silence.step(reports.received, void, served, warming_up)
        contested = said.by_neighbours | silent
        disputes = contradicted | contested
        changed = self.passing.step(evidence.digests[RECEIVED], ~differ, served)
        by_hard = self._without_fence(values, changed, nothing.made)
        whole = ~(disputes | hard[RECEIVED])
        convicted = self._served_by_convicted(served)
        sound = whole
        # Of two, each is all that the other can be held against.
        if self.fences.has_majority and convicted.any():
            by_convicted = np.broadcast_to(sent_by(convicted)[..., None], whole.shape)
            sound = whole & ~by_convicted & ~followers(by_convicted)
        if self.fences.compares_replicas and not twins:
            self.content.step(compared, whole, self.fences.iqr)
        unlike = self.content.unlike
        by_row = by_hard > 0  # on a way of its own, which no statistic can close
        firm = np.logical_or.reduce(by_row, axis=0)
        held = Held(self.fences, compared, by_row, self.table.hard, self.content.room, warming_up)
        cascade = hold_against_fences(held, self.fences, firm, whole, sound)
        turned = self.fences.centre.end_turns()
        residuals, scores = held.residuals, held.largest
        within = np.ones(residuals.shape[:-1], bool)
        summed = np.zeros((np.count_nonzero(of_pair), *scores.shape[:-1]))
        if self.mesh.replicas >= LEAST_REPLICAS and not twins:
            counted = whole & ~cascade
            counted[BACKWARD] &= ~void
            # What is usual of a worker came of the data that it was given. Of one that is dealt anew in every step it
            # is a mean over all columns.
            if self.settings.wiring != "shuffle" and (served != self._served).any():
                self.cusum.forget_usual(columns_of(served) != columns_of(self._served))
            # With what is usual of a column: sums have a usual of their own, which stands still where they grow.
            summed = self.cusum.step(
                residuals[self._pair_rows],
                counted,
                served,
                self.record.convicted,
                evidence.step,
                warming_up,
                unlike,
                evidence.renewed,
                np.where(self.table.adds_up[:, None, None, None], self.fences.usual.level, np.nan)[of_pair],
            )
            within[of_pair] = self.cusum.quiet(served) | unlike
            scores = np.maximum(scores, np.where(counted, np.maximum.reduce(summed, axis=0)[..., None], 0.0))
        alarms = (scores > 1.0) | firm
        explained = Explained.nothing(alarms.shape)
        if np.isfinite(overflow_limit):
            explained = self.overflow.step(reports.largest, hard, served, overflow_limit)
        judged, all_judged = ~explained.shared, not explained.shared.any()
        if not all_judged:
            alarms, scores = alarms & judged, np.where(judged, scores, 0.0)
        trial = None
        nowhere = np.zeros(alarms.shape, bool)
        differing = right = nowhere
        if twins:
            measures = evidence.statistics[..., self.table.measures]
            trial = try_twins(
                self.mesh,
                evidence.digests[RECEIVED],
                measures,
                disputes | ~judged,
                twins,
                served,
                self.record.convicted,
                self.record.accused,
                self.record.unlike,
                evidence.keyed,
            )
            differ, contradicted, disputes = (which | trial.forged for which in (differ, contradicted, disputes))
            differing, right = trial.wrong | trial.undecided, trial.right
            alarms = alarms & ~differing & (either | ~right)
            scores = np.where(alarms, scores, 0.0)

        content = but_for_pair = doubted = turn = undecided = nowhere
        per_statistic = fenced = np.zeros((len(self.table), 0))  # of no use where nothing is in alarm
        if alarms.any():
            values = values.copy()
            values[self._hard] = by_hard
            per_statistic, fenced = held.per_statistic, held.per_statistic[of_pair]
            # What most replicas did, training did, and what comes of it strikes nobody. Nothing excuses a hard row.
            turned &= ~self.table.hard[:, None, None]
            turn = alarms & ~(np.where(turned[..., None, None], 0.0, per_statistic) > 1.0).any(0)
            if self.mesh.replicas >= LEAST_REPLICAS and not twins:
                per_statistic[of_pair] = np.fmax(fenced, np.where(counted, summed[..., None], 0.0))
                turn &= ~(per_statistic[of_pair] > np.fmax(fenced, 1.0)).any(0)
            content, but_for_pair = content_alone(alarms & ~firm, per_statistic, values, unlike, self.table)
            # Without what the two ends report differently nothing would be outside.
            doubted = said.doubted.any(0) & (np.where(said.doubted, 0.0, per_statistic).max(0) <= 1.0)
        reported_only = alarms & ~firm & (not self.fences.compares_replicas)
        if nothing.open.any():
            undecided = np.zeros_like(alarms)
            undecided[BACKWARD] = nothing.open & ~either[BACKWARD] & (changed[BACKWARD] == 0)
        excused = explained.overflow | content | reported_only | right | undecided | doubted | turn
        blame = Blame.of(alarms, disputes | differing, scores, excused, np.asarray(by_row[self._found].any(0)))
        account = Account(self.mesh, served, self.table)
        judged_step = Judged(
            values, residuals, per_statistic, fenced, scores, explained.overflow, content, but_for_pair, doubted, turn
        )
        findings = account.findings(blame, judged_step, self.fences)
        disputed = account.disputes(blame.disputes & ~differing, contradicted)
        facts = differ | said.certain
        facts[BACKWARD] |= nothing.disputed
        by_several = self.unsettled.step(
            served, np.asarray(facts.any(-1)), np.asarray(said.by_neighbours.any(-1)), trial, self.record.convicted
        )
        proved = (*proved, *(replayed.inconsistent if replayed else ()), *(one.worker for one in by_several))
        shown = tried(self.mesh, trial, proved) if trial or proved else None
        changes = self.record.update(
            *entries(self.mesh, findings, disputed),
            shown,
            evidence.refused,
            self.unsettled.doubted,
            self.isolation.beside(served),
        )
        unproved = ((said.by_ends | (alarms & doubted)) & ~facts).any((0, 3))
        self.isolation.step(
            served,
            involved(np.asarray(unproved), np.asarray(leaving(np.asarray(silent.any(-1))).any(0))),
            np.asarray(
                (alarms & ~excused).any((0, 1, 3)) & ~(blame.strikes | disputes).any((0, 1, 3)) & (twins is None)
            ),
            [(one.worker, one.column) for one in findings if one.strikes and one.rests_on_pair],
            changes.cleared,
            self.record.convicted,
            bool((changes.convicted | changes.released).any()),
        )
        suspects = self.record.suspects
        new = suspects & ~self._known
        taught = bool(changes.convicted.any() or self.unsettled.news or self.isolation.news or new.any())
        self._take_for_usual(residuals, blame.strikes, changes.cleared, served, of_twins=twins is not None)

        events = (alarms & ~reported_only) | disputes | differing
        suspected = events.any(axis=(0, 1, 3))
        if replayed:
            suspected |= replayed.spoilt
        if twins and trial:
            suspected |= trial.spoilt | ~twins.given
        convicted = self._served_by_convicted(served)
        excluded = np.zeros_like(suspected)
        if self.settings.action != "observe":
            excluded |= suspected
        if self.settings.action == "quarantine":
            excluded |= convicted.any(0)
        shared = not all_judged and self.settings.action != "observe"
        skip = bool(excluded.all()) or shared
        overflow = skip and (shared or bool((alarms & explained.overflow).any()))
        lost = skip and not overflow
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if lost and not taught else 0
        self._known = self._known | suspects if lost else suspects
        self._served = np.array(served, np.int64)

        # In a skipped step no weight changes, and nothing has to be learnt.
        blamed = blame.named & (events | self.fences.compares_replicas)
        self.clean_links = clean_links(blamed, blame.disputes, contested, events, convicted)
        self.clean_links &= all_judged and not skip and not twins
        if self.clean_links.any():
            chosen = self.clean_links
            if suspected.any():
                # One message just inside a fence may break the next, and would be learnt as the fence's own tail.
                whole_columns = chosen & ~suspected
                chosen = np.where(whole_columns.any(-1, keepdims=True), whole_columns, chosen)
            clean_messages = np.broadcast_to(chosen[..., None], alarms.shape)
            followed = clean_messages
            if content.any():
                followed = np.where(of_pair[:, None, None, None, None], clean_messages, clean_messages | content)
            self.fences.learn(compared, residuals, clean_messages, followed, within, unlike, evidence.step)

        return Verdict(
            step=evidence.step,
            warming_up=warming_up,
            judged=0 if warming_up else int(np.count_nonzero(judged)),
            scores=scores,
            alarms=alarms,
            disputes=disputes,
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
            halt=halt_reason(self.mesh, self.settings, self.record, self.skipped_in_a_row, changes.convicted),
            twins=twins is not None,
            alike=np.asarray(_serving(trial.same, served)[:, ~excluded].all(1)) if trial else NOBODY,
            suspects=suspects,
            proofs=trial.proofs if trial else (),
            differences=trial.differences if trial else (),
            contradicted=tuple(one for one in by_several if changes.convicted[one.worker]),
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
            halt=halt_reason(self.mesh, self.settings, self.record, self.skipped_in_a_row, changes.convicted),
            isolated=self.isolation.isolated.copy(),
        )

    def forget(self, worker: Worker) -> None:
        """Hold nothing against a worker, since another machine is in its place. What is known of columns stays."""
        marked = np.zeros((self.mesh.stages, self.mesh.replicas), bool)
        marked[worker] = True
        self.record.forget(worker)
        self.unsettled.forget(worker)
        self.isolation.forget(worker)
        self.standing.forget(marked)
        self.cusum.forget(marked)

    def state_dict(self) -> dict[str, dict[str, np.ndarray] | np.ndarray]:
        return {
            **{name: getattr(self, name).state_dict() for name in _KEPT},
            "skipped_in_a_row": np.array(self.skipped_in_a_row),
            "known": self._known.copy(),
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
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self._known, self._served = np.array(state["known"]), np.array(state["served"])

    def _take_for_usual(
        self, residuals: np.ndarray, strikes: np.ndarray, cleared: np.ndarray, served: np.ndarray, of_twins: bool
    ) -> None:
        """What lasts of those who are cleared (bool [S, R]) is their own new normal."""
        if not of_twins:
            self.standing.step(residuals, np.asarray(strikes.any(-1)), served)
        elif cleared.any():
            links, mean = self.standing.lasting(cleared)
            self.fences.usual.adopt(links, mean)
            self.cusum.forget(cleared)

    def _without_fence(self, values: np.ndarray, changed: np.ndarray, made: np.ndarray) -> np.ndarray:
        """Hard rows, [hard rows, 2, L, C, M]: what is reported, and what the judge finds."""
        result = values[self._hard]
        result[self._found] = 0.0
        result[self._hard.index(_PASSED_ON)] = changed
        result[self._hard.index(_FROM_NOTHING), BACKWARD] = made
        return result

    def _served_by_convicted(self, served: np.ndarray) -> np.ndarray:
        """Where the worker that serves a column is convicted, bool [S, C]."""
        return _serving(self.record.convicted, served)


def _serving(workers: np.ndarray, served: np.ndarray) -> np.ndarray:
    """Of [S, R] workers those that serve each column, [S, C]."""
    return workers[np.arange(len(workers))[:, None], served]
