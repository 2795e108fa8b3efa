"""The handle on a watched engine: puts it together, wraps the engine's methods and gives them back, keeps state."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.attacks.faults import Faults
from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine import access, checkpoint
from deepspeed_sentinel.engine.comparison import WeightComparison
from deepspeed_sentinel.engine.devices import DeviceRecord
from deepspeed_sentinel.engine.gate import Gate
from deepspeed_sentinel.engine.interception import Interception
from deepspeed_sentinel.engine.liveness import Liveness
from deepspeed_sentinel.engine.loss import mean_of_included
from deepspeed_sentinel.engine.reduction import Poisoned
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.engine.twins import TwinSteps
from deepspeed_sentinel.errors import SentinelHalt
from deepspeed_sentinel.evidence.collector import Collector
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.weights import Comparison
from deepspeed_sentinel.judgement.verdict import Verdict

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
        gate: judges each step, and lets into it what is not in alarm.
        comparison: compares weights when it is due, or when it is asked to.
        devices: what is known of the devices that the workers run on.
    """

    def __init__(self, engine: PipelineEngine, config: SentinelConfig) -> None:
        access.check_supported(engine)
        if hasattr(engine, "sentinel"):
            raise ValueError("this engine already has a sentinel attached; detach it first: engine.sentinel.detach()")
        self.mesh = access.mesh_of(engine)
        config = config.of_mesh(self.mesh)
        self.engine, self.config = engine, config
        self._lenient = config.action == "observe"
        self.worker = access.worker_of(engine)
        for injection in config.inject:
            injection.check_attack()
            injection.check_mesh(self.mesh)
        ranks, device = access.ranks_of(engine), torch.device(engine.device)
        self._control = Control(ranks)
        self._telling = Telling(config, self.mesh, self._control)
        self._ranks = ranks
        self.devices = DeviceRecord(
            config, ranks, self._control, self._telling, device=device, step=lambda: engine.global_steps
        )
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
        self._originals = {name: getattr(engine, name) for name in _WRAPPED}
        self._twins = TwinSteps(engine, self.mesh, self.worker, self._control, config, self._originals["_next_batch"])
        # What a script has put over a method of the engine is its own, and there again after ``detach``.
        self._before = {name: vars(engine)[name] for name in _SET if name in vars(engine)}
        self.gate = Gate(
            engine,
            config,
            self._control,
            self._telling,
            collector=self._collector,
            comparison=self.comparison,
            twins=self._twins,
            interception=self._interception,
            name=lambda rank: self._liveness.name(rank),
        )
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
        self.devices.begin()

    def detach(self) -> None:
        """Give the engine back as it was, but for what the script itself has put over a method since."""
        if getattr(self.engine, "sentinel", None) is not self:
            return
        here = vars(self.engine)
        for name in [name for name, ours in self._ours.items() if here.get(name) is ours]:
            delattr(self.engine, name)
            if name in self._before:
                setattr(self.engine, name, self._before[name])
        self.devices.close()
        self._liveness.stop()
        self._telling.close()

    @property
    def last_verdict(self) -> Verdict | None:
        """Of the last training step."""
        return self.gate.verdict

    @property
    def last_poisoned(self) -> Poisoned | None:
        """What was wrong with the reduction of the last training step, if it was a twin step."""
        return self.gate.poisoned

    @property
    def last_comparison(self) -> Comparison | None:
        """Of the replicas' weights."""
        return self.comparison.last

    @property
    def counts(self) -> dict[str, int]:
        """Of all steps since attaching, see ``Gate``."""
        return self.gate.counts

    def reset(self) -> None:
        """Forget baselines, fences and record; warm up again. What is known of devices stays."""
        self.gate.reset()

    def state_dict(self) -> dict[str, Any]:
        """Everything that later verdicts depend on; the same on all replicas of a stage."""
        return {
            "shape": self.state_shape(),
            "judge": checkpoint.to_tensors(self.gate.judge.state_dict()),
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
        self.gate.judge = self.gate.new_judge(state["shape"].get("parts", 1))
        self.gate.judge.load_state_dict(checkpoint.to_arrays(state["judge"]))
        self._collector.load_state_dict(state["evidence"], without)

    def problem(self, judge: Any, parts: int) -> str | None:
        """Why the judge's part of a state cannot be taken over, in words that follow "checkpoint ..."; or None."""
        return self.gate.new_judge(parts).problem(checkpoint.to_arrays(judge))

    def spoilt_links(self, state: dict[str, Any]) -> tuple[tuple[int, int], ...]:
        """Directions and links of which a state holds baselines that are not finite."""
        return self._collector.spoilt_links(state["evidence"])

    def _wrap(self) -> None:
        engine = self.engine
        engine._INSTRUCTION_MAP = self._liveness.progress.tracked(
            {
                **engine._INSTRUCTION_MAP,
                **self._interception.instructions(),
                **self.gate.instructions(),
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
        self.gate.begin_step()
        self._interception.watching = True
        self.gate.rehearse(lambda: self._originals["_exec_schedule"](pipe_schedule))
        self._originals["_exec_schedule"](pipe_schedule)
        self._interception.watching = False
        self._liveness.progress.end_schedule()
        verdict = self.last_verdict
        assert verdict is not None, "every training step passes the gate"
        self.devices.step(verdict, self.gate.served, self.last_poisoned, self.comparison.unequal_in(verdict.step))
        if verdict.halt:
            self._halt(verdict.halt)

    def gather_words(self, *words: int) -> torch.Tensor:
        """int64 [ranks, W]: what every rank says in W whole numbers. Collective."""
        return self._control.gather_words(*words)

    def of_first_stage(self, mine: torch.Tensor) -> torch.Tensor:
        """uint8 [N]: what the first stage's worker of this column says. Collective."""
        return self._control.of_first_stage(mine)

    def _aggregate_total_loss(self) -> torch.Tensor:
        original: Callable[[], torch.Tensor] = self._originals["_aggregate_total_loss"]
        verdict = self.last_verdict
        if verdict is None or not verdict.excluded.any():
            return original()
        return mean_of_included(self.engine, self.gate.share, bool(verdict.excluded.all()), original)

    def _halt(self, reason: str) -> None:
        folder = f"{self.config.output_dir}/halt_checkpoint"
        self.engine.save_checkpoint(folder)
        raise SentinelHalt(
            f"training stopped after step {self.engine.global_steps}: {reason}. Checkpoint without the excluded "
            f"contributions: {folder}. See {self.config.output_dir}/events.jsonl."
        )
