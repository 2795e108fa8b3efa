"""The handle on a watched engine: wraps its instructions, judges between backward and reduction, acts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import logger

from deepspeed_sentinel.attacks.faults import Faults
from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine import access, checkpoint
from deepspeed_sentinel.engine.agreement import disagreement
from deepspeed_sentinel.engine.board import rendezvous_host
from deepspeed_sentinel.engine.buffers import ForwardState
from deepspeed_sentinel.engine.comparison import WeightComparison
from deepspeed_sentinel.engine.interception import Interception
from deepspeed_sentinel.engine.liveness import Liveness
from deepspeed_sentinel.engine.loss import mean_of_included
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.engine.tied import reduce_tied_gradients
from deepspeed_sentinel.engine.twins import TwinSteps, as_told
from deepspeed_sentinel.errors import SentinelHalt, VerdictMismatch
from deepspeed_sentinel.evidence.collector import Collector
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.parts import Layout
from deepspeed_sentinel.evidence.table import Evidence, Twins
from deepspeed_sentinel.evidence.weights import Comparison, tensors_digest
from deepspeed_sentinel.judgement.complaints import complained_of
from deepspeed_sentinel.judgement.judge import Judge, JudgeSettings
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.response.audit import audits_due, rule
from deepspeed_sentinel.response.gate import Share
from deepspeed_sentinel.response.hearing import Hearing

# Whole, not their schedules alone: they communicate before and after. Checkpoints are not watched, since a script may
# go on after an error in one, and what a watched method fails with ends all ranks.
_WATCHED = ("train_batch", "eval_batch")
_WRAPPED = ("_exec_schedule", "_next_batch", "_aggregate_total_loss", "save_checkpoint", "load_checkpoint", *_WATCHED)
_SET = ("_INSTRUCTION_MAP", "sentinel", *_WRAPPED)


class Sentinel:
    """Watches one PipelineEngine until ``detach()``.

    Attributes:
        config: the effective settings.
        mesh: stages and replicas.
        last_verdict: of the last training step, or None.
        last_comparison: of the replicas' weights, or None.
        comparison: compares them when it is due, or when it is asked to.
        counts: judged_messages, alarms (messages blamed on a worker), disputes, skipped_steps,
            excluded_column_steps since attaching.
    """

    def __init__(self, engine: PipelineEngine, config: SentinelConfig) -> None:
        access.check_supported(engine)
        if hasattr(engine, "sentinel"):
            raise ValueError("this engine already has a sentinel attached; detach it first: engine.sentinel.detach()")
        self.engine, self.config = engine, config
        self._lenient = config.action == "observe"
        self.mesh = access.mesh_of(engine)
        self.worker = access.worker_of(engine)
        for injection in config.inject:
            injection.check_attack()
            injection.check_mesh(self.mesh)
        self.last_verdict: Verdict | None = None
        self.counts = dict.fromkeys(
            ("judged_messages", "alarms", "disputes", "skipped_steps", "excluded_column_steps"), 0
        )
        ranks, device = access.ranks_of(engine), torch.device(engine.device)
        self._control = Control(ranks)
        self._telling = Telling(config, self.mesh, self._control)
        self._ranks = ranks
        self.comparison = WeightComparison(
            engine,
            self.worker,
            ranks,
            self._control,
            self._telling,
            every=config.weights_every,
            lenient=self._lenient,
        )
        self._collector = Collector(
            self.mesh,
            self.worker,
            ranks,
            replica_group=engine.mpu.get_data_parallel_group(),
            control=self._control,
            device=device,
            decays=(config.activation_decay, config.gradient_decay),
            seed=config.seed,
            lenient=self._lenient,
        )
        faults = Faults(config.inject, self.worker, config.seed or 0)
        self._interception = Interception(
            engine, self._collector.probe, self._collector.keeping, faults, lenient=self._lenient
        )
        self._forward_state = ForwardState(access.stage_module(engine))
        self._hearing = Hearing(
            self.worker,
            ranks,
            self._control,
            device,
            testify=self._collector.testify,
            most_bytes=lambda: self._collector.keeping.most_bytes,
            secret_with=self._collector.keys.secret_with,
            towards=rendezvous_host(),
        )
        self._originals = {name: getattr(engine, name) for name in _WRAPPED}
        self._twins = TwinSteps(engine, self.mesh, self.worker, self._control, config, self._originals["_next_batch"])
        # What a script has put over a method of the engine is its own, and there again after ``detach``.
        self._before = {name: vars(engine)[name] for name in _SET if name in vars(engine)}
        self.reset()
        self._liveness = Liveness(
            self.mesh,
            ranks,
            self._control,
            heartbeat_timeout=config.heartbeat_timeout,
            timeouts=access.timeouts(engine),
            step=lambda: engine.global_steps,
            ends=not self._lenient,
        )
        self._wrap()
        self._telling.start(engine.global_steps)

    def detach(self) -> None:
        """Give the engine back as it was, but for what the script itself has put over a method since."""
        if getattr(self.engine, "sentinel", None) is not self:
            return
        here = vars(self.engine)
        for name in [name for name, ours in self._ours.items() if here.get(name) is ours]:
            delattr(self.engine, name)
            if name in self._before:
                setattr(self.engine, name, self._before[name])
        self._liveness.stop()
        self._telling.close()

    def reset(self) -> None:
        """Forget baselines, fences and record; warm up again."""
        layout = self._collector.layout
        self._judge = self._new_judge(layout.parts if layout else 1)
        self._collector.reset()
        self._share = Share(included=True, factor=1.0)

    def _new_judge(self, parts: int) -> Judge:
        values = {name: getattr(self.config, name) for name in JudgeSettings.__dataclass_fields__}
        chosen = {"seed": self.config.seed or 0, "conviction": self.config.convicts_by(self.mesh)}
        return Judge(self.mesh, JudgeSettings(**{**values, **chosen}), parts)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later verdicts depend on; the same on all replicas of a stage."""
        return {
            "shape": self.state_shape(),
            "judge": checkpoint.to_tensors(self._judge.state_dict()),
            "evidence": self._collector.state_dict(),
        }

    def state_shape(self) -> dict[str, int]:
        """What must be equal for a state to be taken over."""
        layout = self._collector.layout
        return {
            "stages": self.mesh.stages,
            "replicas": self.mesh.replicas,
            "fence_window": self.config.fence_window,
            "strike_window": self.config.strike_window,
            **({"parts": layout.parts} if layout else {}),
        }

    def load_state_dict(self, state: dict[str, Any], without: Collection[tuple[int, int]] = ()) -> None:
        """Take a state over, but for the baselines of some directions and links."""
        self._judge = self._new_judge(state["shape"].get("parts", 1))
        self._judge.load_state_dict(checkpoint.to_arrays(state["judge"]))
        self._collector.load_state_dict(state["evidence"], without)

    def problem(self, judge: Any, parts: int) -> str | None:
        """Why the judge's part of a state cannot be taken over, in words that follow "checkpoint ..."; or None."""
        return self._new_judge(parts).problem(checkpoint.to_arrays(judge))

    def spoilt_links(self, state: dict[str, Any]) -> tuple[tuple[int, int], ...]:
        """Directions and links of which a state holds baselines that are not finite."""
        return self._collector.spoilt_links(state["evidence"])

    def _wrap(self) -> None:
        engine = self.engine
        engine._INSTRUCTION_MAP = self._liveness.progress.tracked(
            {
                **engine._INSTRUCTION_MAP,
                **self._interception.instructions(),
                schedule.ReduceTiedGrads: self._reduce_tied_gradients,
                schedule.ReduceGrads: self._reduce_gradients,
                schedule.OptimizerStep: self._optimizer_step,
            }
        )
        engine._exec_schedule = self._exec_schedule
        engine._next_batch = self._twins.next_batch
        engine._aggregate_total_loss = self._aggregate_total_loss
        engine.save_checkpoint = checkpoint.saver(self._originals["save_checkpoint"], self)
        engine.load_checkpoint = checkpoint.loader(self._originals["load_checkpoint"], self)
        for name in _WATCHED:
            setattr(engine, name, self._liveness.watched(getattr(engine, name)))
        engine.sentinel = self
        self._ours = {name: vars(engine)[name] for name in _SET}

    def _exec_schedule(self, pipe_schedule: schedule.PipeSchedule) -> None:
        if not isinstance(pipe_schedule, schedule.TrainSchedule):
            self._originals["_exec_schedule"](pipe_schedule)
            self._liveness.progress.end_schedule()
            return
        self.comparison.begin_step()
        self._twins.begin_step(self.engine.global_steps, self._suspicion)
        self._collector.begin_step(self.engine.global_steps, self.engine.micro_batches)
        self._forward_state.begin_step()
        self._interception.watching = True
        self._originals["_exec_schedule"](pipe_schedule)
        self._interception.watching = False
        self._liveness.progress.end_schedule()
        if self.last_verdict and self.last_verdict.halt:
            self._halt(self.last_verdict.halt)

    def _reduce_tied_gradients(self, engine: PipelineEngine) -> None:
        self._pass_gate()
        assert self.last_verdict is not None
        if not self.last_verdict.skip:
            reduce_tied_gradients(engine)

    def _reduce_gradients(self, engine: PipelineEngine) -> None:
        self._unless_skipped(schedule.ReduceGrads)

    def _optimizer_step(self, engine: PipelineEngine, **kwargs: Any) -> None:
        assert self.last_verdict is not None
        if self.last_verdict.skip:
            access.skip_step(engine, self.last_verdict.overflow)
        else:
            self._interception.run_original(schedule.OptimizerStep, **kwargs)

    def _unless_skipped(self, instruction: type) -> None:
        assert self.last_verdict is not None
        if not self.last_verdict.skip:
            self._interception.run_original(instruction)

    @torch.no_grad()
    def _pass_gate(self) -> None:
        """Evidence, verdict, exclusion: all that happens between backward and reduction."""
        step = self.engine.global_steps
        first = self._collector.layout is None
        evidence = replace(
            self._collector.collect(step, access.gradient_scale(self.engine)), twins=self._told_of_twins()
        )
        if first:
            self._take_layout()
        for told in self._collector.changed():
            logger.warning(f"[sentinel] {told}")
        self._telling.unseen(self._collector.probe.unseen)
        if evidence.twins and self.config.weights_every:
            self.comparison.compare()
        verdict = self._judge.step(evidence, access.overflow_limit(self.engine), self._unequal(step))
        if self._agree(verdict):
            verdict = self._audit(verdict, evidence)
        if self._judge.clean_links.any():
            self._collector.learn(self._judge.clean_links)
        self._share = Share.of(verdict.excluded, self.worker.replica)
        if not verdict.skip:
            self._share.apply_(access.gradients(self.engine))
        self._forward_state.end_step(counts=self._share.included)
        self.last_verdict = verdict
        self._count(verdict)
        self._telling.verdict(verdict)

    def _unequal(self, step: int) -> tuple[Worker, ...]:
        """Who held other weights than its stage in this step."""
        last = self.last_comparison
        return last.unequal if last and last.step == step else ()

    @property
    def _suspicion(self) -> bool:
        return bool(self._judge.record.suspects.any())

    def _told_of_twins(self) -> Twins | None:
        """What the step was, if it is a twin step."""
        if not self._twins.possible(self._suspicion):
            return None
        gradients = list(access.gradients(self.engine))
        digest = int(tensors_digest(gradients, torch.device(self.engine.device))) if gradients else 0
        # First what each has accumulated, then what the step was: nobody can choose the one by the other.
        accumulated = self.gather_words(digest).numpy()[self._ranks][..., 0]
        words = self.gather_words(self._twins.word).numpy()[self._ranks][..., 0]
        return as_told(words, accumulated)

    def _agree(self, verdict: Verdict) -> bool:
        """Whether all ranks came to the same verdict; where one may be acted on, all stop unless they did."""
        said = self.gather_words(verdict.digest(), self._collector.complaint)
        split = disagreement(said[:, 0], verdict.step, self._liveness.name)
        if split and not self._lenient:
            raise VerdictMismatch(
                f"{split} No gradient of this step was applied. Resume from the last checkpoint without them."
            )
        if split:
            self._telling.split(split)
        for worker in complained_of(said[:, 1].numpy()[self._ranks]):
            self._telling.misfit(verdict.step - 1, worker)
        return split is None

    def gather_words(self, *words: int) -> torch.Tensor:
        """int64 [ranks, W]: what every rank says in W whole numbers. Collective."""
        return self._control.all_gather(torch.tensor(words, dtype=torch.int64))

    def of_first_stage(self, mine: torch.Tensor) -> torch.Tensor:
        """uint8 [N]: what the first stage's worker of this column says. Collective."""
        return self._control.of_first_stage(mine)

    def _audit(self, verdict: Verdict, evidence: Evidence) -> Verdict:
        """Take back the strikes that rest on neighbours' words and that no trusted worker could confirm."""
        # A strike that convicts nobody by itself needs no second look: a twin step is one.
        audits = () if self._judge.record.by_proof else audits_due(verdict, evidence)
        if not audits:
            return verdict
        ruling = rule(verdict, audits, self._hearing.hold(audits, evidence, self._layout))
        return self._judge.retract(ruling.verdict, ruling.opened, ruling.refuted)

    def _aggregate_total_loss(self) -> torch.Tensor:
        original: Callable[[], torch.Tensor] = self._originals["_aggregate_total_loss"]
        verdict = self.last_verdict
        if verdict is None or not verdict.excluded.any():
            return original()
        return mean_of_included(self.engine, self._share, verdict.skip, original)

    def _halt(self, reason: str) -> None:
        folder = f"{self.config.output_dir}/halt_checkpoint"
        self.engine.save_checkpoint(folder)
        raise SentinelHalt(
            f"training stopped after step {self.engine.global_steps}: {reason}. Checkpoint without the excluded "
            f"contributions: {folder}. See {self.config.output_dir}/events.jsonl."
        )

    def _count(self, verdict: Verdict) -> None:
        self.counts["judged_messages"] += verdict.judged
        self.counts["alarms"] += sum(len(finding.micro_batches) for finding in verdict.findings)
        self.counts["disputes"] += len(verdict.disputed)
        self.counts["skipped_steps"] += verdict.skip
        self.counts["excluded_column_steps"] += int(np.count_nonzero(verdict.excluded))

    @property
    def last_comparison(self) -> Comparison | None:
        return self.comparison.last

    @property
    def _layout(self) -> Layout:
        assert self._collector.layout is not None, "agreed on before the first verdict"
        return self._collector.layout

    def _take_layout(self) -> None:
        """Say once what is not judged, and judge as many parts as there are."""
        if self.worker.replica == 0 and (told := self._collector.not_judged()):
            logger.warning(f"[sentinel] {told}")
        parts = self._layout.parts
        if self._judge.table.parts == parts:
            return
        if self._judge.fences.learnt_steps:
            self._telling.anew(parts, before=self._judge.table.parts)
        self.reset()
