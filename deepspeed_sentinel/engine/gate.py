"""The gate: what happens in a training step between its backward passes and the next one. Evidence, verdict, exclusion.

``Sentinel`` puts the gate's instructions in place of DeepSpeed's, and calls ``begin_step``. The step is judged when the
gradients of tied weights are to be reduced: DeepSpeed asks for that first, in models without any too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine import access
from deepspeed_sentinel.engine.agreement import disagreement
from deepspeed_sentinel.engine.board import rendezvous_host
from deepspeed_sentinel.engine.buffers import ForwardState
from deepspeed_sentinel.engine.columns import Columns
from deepspeed_sentinel.engine.comparison import WeightComparison
from deepspeed_sentinel.engine.interception import Interception
from deepspeed_sentinel.engine.randomness import StepRandomness
from deepspeed_sentinel.engine.reduction import Poisoned, Reduction
from deepspeed_sentinel.engine.replay import Replay
from deepspeed_sentinel.engine.requests import Decision, Requests
from deepspeed_sentinel.engine.shared_state import UNSHARED, SharedState
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.engine.tied import reduce_tied_gradients
from deepspeed_sentinel.engine.trace import span
from deepspeed_sentinel.engine.twins import TwinSteps, as_told, kind, norm_bits, was_refused
from deepspeed_sentinel.errors import VerdictMismatch
from deepspeed_sentinel.evidence.collector import Collector
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.parts import Layout
from deepspeed_sentinel.evidence.step import Evidence, Twins
from deepspeed_sentinel.evidence.weights import tensors_digest
from deepspeed_sentinel.judgement.complaints import complained_of
from deepspeed_sentinel.judgement.judge import Judge, JudgeSettings
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.response.audit import audits_due, rule
from deepspeed_sentinel.response.gate import Share
from deepspeed_sentinel.response.hearing import Hearing
from deepspeed_sentinel.telemetry import console


class Gate:
    """Lets into a step what is not in alarm.

    Attributes:
        judge: what is learnt of messages, and the record of workers.
        verdict: of the last step, or None.
        columns: who serves which.
        poisoned: what was wrong with the reduction of the last step, if it was a twin step; or None.
        share: what this worker's column contributes to the step.
        hearing: of witnesses, where an audit is due.
        decision: what became of the requests for another action that were told in the last step; or None.
        counts: judged_messages, alarms (messages blamed on a worker), disputes, skipped_steps,
            excluded_column_steps.

    Args:
        engine: whose steps.
        config: the effective settings.
        control: of the small exchanges.
        telling: says what a step came to.
        collector, comparison, twins, interception: of this engine.
        requests: for another action, of this rank.
        name: what a rank is called.
    """

    def __init__(
        self,
        engine: PipelineEngine,
        config: SentinelConfig,
        control: Control,
        telling: Telling,
        *,
        collector: Collector,
        comparison: WeightComparison,
        twins: TwinSteps,
        interception: Interception,
        requests: Requests,
        name: Callable[[int], str],
    ) -> None:
        self._engine, self._config, self._control, self._telling = engine, config, control, telling
        self._collector, self._comparison, self._twins = collector, comparison, twins
        self._interception, self._requests, self._name = interception, requests, name
        self._mesh, self._worker = access.mesh_of(engine), access.worker_of(engine)
        self._ranks = access.ranks_of(engine)
        self._reduction = Reduction(engine, self._worker, self._ranks, control)
        self._randomness = StepRandomness(collector.secret)
        self._forward_state = ForwardState(access.stage_module(engine))
        self._shared_state = SharedState(
            access.stage_module(engine),
            self._forward_state.first,
            self._worker.replica,
            self._mesh.replicas,
            control,
            torch.device(engine.device),
            telling.note,
        )
        self._replay = Replay(
            engine,
            self._mesh,
            self._ranks,
            control,
            collector.probe,
            every=config.twins.replay,
            seed=config.seed or 0,
        )
        self.hearing = Hearing(
            self._worker,
            self._ranks,
            control,
            torch.device(engine.device),
            testify=collector.testify,
            most_bytes=lambda: collector.keeping.most_bytes,
            secret_with=collector.keys.secret_with,
            towards=rendezvous_host(),
            say=telling.note,
        )
        self.verdict: Verdict | None = None
        self.decision: Decision | None = None
        self.columns = Columns(engine, config, collector, telling)
        self.counts = dict.fromkeys(
            ("judged_messages", "alarms", "disputes", "skipped_steps", "excluded_column_steps"), 0
        )
        self.reset()

    def reset(self) -> None:
        """Forget baselines, fences and record; warm up again."""
        layout = self._collector.layout
        self.judge = self.new_judge(layout.parts if layout else 1)
        self._collector.reset()
        self.share = Share(included=True, factor=1.0)
        self._state = UNSHARED  # what this worker tells of the state in which it began the step
        self.poisoned: Poisoned | None = None

    def new_judge(self, parts: int) -> Judge:
        """One that has learnt nothing.

        Args:
            parts: judged ones of each message.
        """
        values = {name: getattr(self._config, name) for name in JudgeSettings.__dataclass_fields__}
        chosen = {"seed": self._config.seed or 0, "conviction": self._config.convicts_by(self._mesh)}
        return Judge(self._mesh, JudgeSettings(**{**values, **chosen}), parts)

    def go_by(self, config: SentinelConfig) -> None:
        """Judge by other settings from the next step on, as a run would that goes on from a checkpoint with them."""
        self._config, known = config, self.judge.state_dict()
        self.judge = self.new_judge(self.judge.table.parts)
        self.judge.load_state_dict(known)
        self.columns.go_by(config)

    @property
    def _lenient(self) -> bool:
        return self._config.action == "observe"

    def instructions(self) -> dict[type, Callable[..., Any]]:
        """Entries for an engine's ``_INSTRUCTION_MAP``."""
        return {
            schedule.ReduceTiedGrads: self._reduce_tied_gradients,
            schedule.ReduceGrads: self._reduce_gradients,
            schedule.OptimizerStep: self._optimizer_step,
        }

    def begin_step(self) -> None:
        """Before a training step's first message. Collective."""
        step = self._engine.global_steps
        self._comparison.begin_step()
        self._twins.begin_step(step, self._suspicion)
        self._begin_messages(step)
        if self._may_be_twins or (self._shared_state.due and self._twins.configured):
            self._state = self._shared_state.share(gives=not self._lenient)
        self._forward_state.begin_step(everything=self._replay.due(step))
        middle = not self._mesh.is_trusted(self._worker.stage)
        self._randomness.begin_step(step, same=self._twins.is_known or (middle and self._may_be_twins))

    def rehearse(self, run: Callable[[], None]) -> None:
        """Run this step's schedule once for nothing, if it is one to be replayed. After ``begin_step``.

        Args:
            run: the schedule.
        """
        step = self._engine.global_steps
        if not self._replay.due(step):
            return
        said = self._control.gather_words(self._twins.draw_twice()).numpy()[self._ranks]
        if self._twins.hinders_replay(int(said[[0, -1]].max())):
            return

        def put_back() -> None:
            self._forward_state.rewind()
            self._begin_messages(step)

        self._replay.rehearse(run, put_back)

    def leave_step(self) -> None:
        """After a schedule, also one that broke off: random numbers go on from where they were."""
        self._randomness.end_step()

    def _begin_messages(self, step: int) -> None:
        keyed = self._may_be_twins or self._replay.due(step)
        self._collector.begin_step(step, self._engine.micro_batches, keyed)

    def _reduce_tied_gradients(self, engine: PipelineEngine) -> None:
        self._pass()
        assert self.verdict is not None
        if not self.verdict.skip:
            reduce_tied_gradients(engine)

    def _reduce_gradients(self, engine: PipelineEngine) -> None:
        verdict = self.verdict
        assert verdict is not None
        self.poisoned = None
        if verdict.skip:
            return
        if not verdict.twins:
            self._interception.run_original(schedule.ReduceGrads)
            return
        wiring = self.columns.wiring
        included_SR = np.zeros(wiring.shape, bool)
        np.put_along_axis(included_SR, wiring, verdict.alike[:, None] & ~verdict.excluded, axis=1)
        self.poisoned = self._reduction.watch(
            lambda: self._interception.run_original(schedule.ReduceGrads), included_SR, self.share.factor
        )
        if self.poisoned:
            self._telling.poisoned(self.poisoned)

    def _optimizer_step(self, engine: PipelineEngine, **kwargs: Any) -> None:
        assert self.verdict is not None
        if self.verdict.skip or (self.poisoned and not self._lenient):
            access.skip_step(engine, self.verdict.overflow)
        else:
            self._interception.run_original(schedule.OptimizerStep, **kwargs)

    def _pass(self) -> None:
        with span("gate"):
            self._judge_and_exclude()

    @torch.no_grad()
    def _judge_and_exclude(self) -> None:
        """Evidence, verdict, exclusion: all that happens between backward and reduction."""
        self._randomness.end_step()
        step = self._engine.global_steps
        first = self._collector.layout is None
        with span("collect"):
            collected = self._collector.collect(step, access.gradient_scale(self._engine))
        twins, refused = self._told_of_twins()
        evidence = replace(collected, twins=twins, refused=refused)
        if first:
            self._take_layout()
        for told in self._collector.changed():
            console.say(f"{told}")
        self._telling.unseen(self._collector.probe.unseen)
        if evidence.twins and self._config.weights_every:
            self._comparison.compare()
        replayed = self._replay.compare(self.columns.wiring)
        limit, proved = access.overflow_limit(self._engine), self._proved_otherwise(step)
        with span("judge"):
            verdict = self.judge.step(evidence, limit, proved, replayed)
        if replayed:
            self._telling.replayed(step, replayed.inconsistent)
        # Before an audit, which may hang: what is dealt is agreed on with the verdict.
        verdict = replace(verdict, wiring=self.columns.deal(step, self.judge.doubts))
        if self._agree(verdict):
            verdict = self._audit(verdict, evidence)
        if self.judge.clean_links.any():
            self._collector.learn(self.judge.clean_links)
        self.share = Share.of(verdict.excluded, self.columns.own)
        if not verdict.skip:
            self.share.apply_(access.gradients(self._engine))
        self._forward_state.end_step(self.share.included, all_count=not verdict.excluded.any())
        out_R = np.zeros(self._mesh.replicas, bool)
        out_R[self.columns.wiring[self._worker.stage]] = verdict.excluded
        self._shared_state.left_out(out_R)
        self.verdict = verdict
        self._count(verdict)
        self._telling.verdict(verdict)

    def _proved_otherwise(self, step: int) -> tuple[Worker, ...]:
        """Who held other weights than its stage in this step, or altered the reduction of the last one."""
        return (*self._comparison.unequal_in(step), *(self.poisoned.named if self.poisoned else ()))

    @property
    def _suspicion(self) -> float:
        return self.judge.record.suspicion

    @property
    def _may_be_twins(self) -> bool:
        """The step may be a twin step; the same from its begin to its verdict."""
        return self._twins.possible(self._suspicion)

    def _told_of_twins(self) -> tuple[Twins | None, bool]:
        """What the step was, if it is a twin step; and whether it was to be one and could not."""
        if not self._may_be_twins:
            return None, False
        gradients, device = list(access.gradients(self._engine)), torch.device(self._engine.device)
        digest = int(tensors_digest(gradients, device)) if gradients else 0
        # First what each has accumulated, then what the step was: nobody can choose the one by the other.
        own = (digest, norm_bits(gradients), kind(device), self._state)
        accumulated, norms, kinds, states = np.moveaxis(self._control.gather_words(*own).numpy()[self._ranks], -1, 0)
        words = self._control.gather_words(self._twins.word).numpy()[self._ranks][..., 0]
        twins = as_told(words, accumulated, np.ascontiguousarray(norms).view(np.float64), kinds, states)
        return twins, was_refused(words)

    def _agree(self, verdict: Verdict) -> bool:
        """Whether all ranks came to the same verdict; where one may be acted on, all stop unless they did."""
        words = (verdict.digest(), self._collector.complaint, self._requests.take_word())
        said = self._control.gather_words(*words)
        split = disagreement(said[:, 0], verdict.step, self._name)
        if split and not self._lenient:
            raise VerdictMismatch(
                f"{split} No gradient of this step was applied. Resume from the last checkpoint without them."
            )
        if split:
            self._telling.split(split)
        self.decision = self._requests.decide(said[:, 2].numpy())
        for worker in complained_of(said[:, 1].numpy()[self._ranks]):
            self._telling.misfit(verdict.step - 1, worker)
        return split is None

    def _audit(self, verdict: Verdict, evidence: Evidence) -> Verdict:
        """Take back the strikes that rest on neighbours' words and that no trusted worker could confirm."""
        # A strike that cannot come to convict needs no second look: a twin step is one.
        counts = self.judge.record.strikes_count
        audits = tuple(audit for audit in audits_due(verdict, evidence) if counts[audit.finding.worker.stage])
        if not audits:
            return verdict
        ruling = rule(verdict, audits, self.hearing.hold(audits, evidence, self._layout))
        return self.judge.retract(ruling.verdict, ruling.opened, ruling.refuted)

    def _count(self, verdict: Verdict) -> None:
        self.counts["judged_messages"] += verdict.judged
        self.counts["alarms"] += sum(len(finding.micro_batches) for finding in verdict.findings)
        self.counts["disputes"] += len(verdict.disputed)
        self.counts["skipped_steps"] += verdict.skip
        self.counts["excluded_column_steps"] += int(np.count_nonzero(verdict.excluded))

    @property
    def _layout(self) -> Layout:
        assert self._collector.layout is not None, "agreed on before the first verdict"
        return self._collector.layout

    def _take_layout(self) -> None:
        """Say once what is not judged, and judge as many parts as there are."""
        if self._worker.replica == 0 and (told := self._collector.not_judged()):
            console.say(f"{told}")
        parts = self._layout.parts
        if self.judge.table.parts == parts:
            return
        if self.judge.fences.learnt_steps:
            self._telling.anew(parts, before=self.judge.table.parts)
        self.reset()
