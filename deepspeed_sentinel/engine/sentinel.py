"""The handle on a watched engine: puts it together, wraps the engine's methods and gives them back, keeps state."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.attacks.faults import Faults
from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.ending import HALTED_EXIT_CODE, ends_with
from deepspeed_sentinel.engine import access, checkpoint
from deepspeed_sentinel.engine.comparison import WeightComparison
from deepspeed_sentinel.engine.controlfile import FILE as CONTROL_FILE
from deepspeed_sentinel.engine.controlfile import ControlFile
from deepspeed_sentinel.engine.convictions import Convictions
from deepspeed_sentinel.engine.devices import DeviceRecord, gather_devices
from deepspeed_sentinel.engine.entries import Entries
from deepspeed_sentinel.engine.gate import Gate
from deepspeed_sentinel.engine.interception import Interception
from deepspeed_sentinel.engine.liveness import Liveness
from deepspeed_sentinel.engine.loss import mean_of_included, mean_without
from deepspeed_sentinel.engine.muster import muster
from deepspeed_sentinel.engine.placement import elsewhere, placement
from deepspeed_sentinel.engine.reduction import Poisoned
from deepspeed_sentinel.engine.requests import Decision, Requests
from deepspeed_sentinel.engine.sinks import Sinks
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.engine.twins import TwinSteps
from deepspeed_sentinel.errors import SentinelHalt
from deepspeed_sentinel.evidence.collector import Collector
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.weights import Comparison
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import workers_of
from deepspeed_sentinel.telemetry.eventlog import EVENTS_FILE
from deepspeed_sentinel.telemetry.exclusion import FILE, Convict
from deepspeed_sentinel.telemetry.who import Who

# Whole, not their schedules alone: they communicate before and after. Checkpoints are not watched, since a script may
# go on after an error in one, and what a watched method fails with ends all ranks.
_WATCHED = ("train_batch", "eval_batch")
_WRAPPED = (
    *("_exec_schedule", "_next_batch", "_aggregate_total_loss", "_reduce_outputs"),
    *("save_checkpoint", "load_checkpoint", *_WATCHED),
)
_SET = ("_INSTRUCTION_MAP", "sentinel", *_WRAPPED)


class Sentinel:
    """Watches one PipelineEngine until ``detach()``.

    Attributes:
        config: the effective settings, of which ``action`` may be changed.
        mesh: stages and replicas.
        gate: judges each step, and lets into it what is not in alarm.
        comparison: compares weights when it is due, or when it is asked to.
        devices: what is known of the devices that the workers run on.
        who: names workers: ``str(sentinel.who(worker))`` has its rank, host and device.
    """

    def __init__(self, engine: PipelineEngine, config: SentinelConfig) -> None:
        access.check_supported(engine)
        if hasattr(engine, "sentinel"):
            raise ValueError(
                "this engine already has a sentinel attached, with other settings; detach it first: "
                "engine.sentinel.detach()"
            )
        self.mesh = access.mesh_of(engine)
        self._given = config
        config = config.of_mesh(self.mesh)
        self.engine, self.config = engine, config
        self.worker = access.worker_of(engine)
        for injection in config.inject:
            injection.check_attack()
            injection.check_mesh(self.mesh)
        ranks, device = access.ranks_of(engine), torch.device(engine.device)
        muster(access.store(), dist.get_rank(), ranks.size, limit=access.timeouts(engine)[0].total_seconds())
        self._control = Control(ranks)
        devices, told = gather_devices(self._control, ranks, device)
        self.who = Who(ranks, devices)
        self._telling = Telling(config, self.mesh, self._control, self.who)
        labels = {"run_id": self._telling.run_id, "stages": str(self.mesh.stages), "replicas": str(self.mesh.replicas)}
        self._sinks = Sinks(engine, config, self._control, self.who, labels, self._telling.note)
        self._telling.ledger(told)
        self.devices = DeviceRecord(config, devices, self._control, self._telling, step=lambda: engine.global_steps)
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
        path, first = Path(config.output_dir) / CONTROL_FILE, dist.get_rank() == 0
        self._requests = Requests(
            self.mesh, ranks, self._with_action, ControlFile(path, self._telling.note) if first else None
        )
        self.gate = Gate(
            engine,
            config,
            self._control,
            self._telling,
            collector=self._collector,
            comparison=self.comparison,
            twins=self._twins,
            interception=self._interception,
            requests=self._requests,
            name=lambda rank: self._liveness.name(rank),
        )
        self._liveness = Liveness(
            self.mesh,
            ranks,
            self._control,
            heartbeat_timeout=config.heartbeat_timeout,
            timeouts=access.timeouts(engine),
            step=lambda: engine.global_steps,
            wiring=self.gate.columns.of,
            fill=self.who.fill,
            ends=not self._lenient,
        )
        self._convictions = Convictions(
            config.output_dir,
            self.who,
            lambda: self.gate.judge.record.convicted,
            step=lambda: engine.global_steps,
            injected=bool(config.inject),
        )
        self._wrap()
        self._telling.start(engine.global_steps)
        self.devices.begin()
        # A script need not detach, and one that ends by an error does not.
        atexit.register(self._end)

    def detach(self) -> None:
        """Give the engine back as it was, but for what the script itself has put over a method since."""
        if getattr(self.engine, "sentinel", None) is not self:
            return
        self.gate.columns.give_back()
        here = vars(self.engine)
        for name in [name for name, ours in self._ours.items() if here.get(name) is ours]:
            delattr(self.engine, name)
            if name in self._before:
                setattr(self.engine, name, self._before[name])
        self._end()
        atexit.unregister(self._end)
        self.devices.close()
        self._liveness.stop()
        self._telling.close()

    def has(self, config: SentinelConfig) -> bool:
        """Whether these are the settings that it was attached with; attached settings are enabled ones."""
        given = self._given.of_mesh(self.mesh)
        return config.of_mesh(self.mesh).model_copy(update={"enabled": given.enabled}) == given

    @property
    def action(self) -> str:
        """By which steps are judged, see the config.

        Set, it is told to all ranks in the next step, and in effect on all of them from the one after it, as if the
        config had it. So it may be set on one rank of the first or the last stage, or on any of them; requests of
        others count for nothing, since those stages alone are trusted, and of several the lowest rank's counts. It is
        in no checkpoint: a run that starts anew goes by its config.

        Raises:
            ValueError: where it is set, if there is no such action, or the config could not have it.
        """
        return str(self.config.action)

    @action.setter
    def action(self, action: str) -> None:
        self._requests.ask(action)

    def _with_action(self, action: str) -> SentinelConfig:
        return self._given.with_action(action, self.mesh)

    @property
    def _lenient(self) -> bool:
        return self.config.action == "observe"

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
            "columns": checkpoint.to_tensors(self.gate.columns.state_dict()),
            "convicts": self._convictions.state_dict(),
            "placement": checkpoint.to_tensors(placement(self.who.devices)),
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
        self.gate.columns.load_state_dict(checkpoint.to_arrays(state["columns"]))
        self._convictions.load_state_dict(state.get("convicts"))
        self._collector.load_state_dict(state["evidence"], without)
        for worker in elsewhere(checkpoint.to_arrays(state.get("placement")), self.who.devices):
            self.gate.judge.forget(worker)
        for convict in self._convictions.replaced:
            self.gate.judge.forget(convict.worker)
            self._telling.replaced(self.engine.global_steps, convict)

    def problem(self, state: dict[str, Any], parts: int) -> str | None:
        """Why what the first stage alone keeps cannot be taken over, in words that follow "checkpoint ..."; or None."""
        judge, columns = (checkpoint.to_arrays(state.get(name)) for name in ("judge", "columns"))
        return self.gate.new_judge(parts).problem(judge) or self.gate.columns.problem(columns)

    def spoilt_links(self, state: dict[str, Any]) -> tuple[tuple[int, int], ...]:
        """Directions and links of which a state holds baselines that are not finite."""
        return self._collector.spoilt_links(state["evidence"])

    def _wrap(self) -> None:
        engine = self.engine
        self._entries = Entries({**self._interception.instructions(), **self.gate.instructions()})
        engine._INSTRUCTION_MAP = self._liveness.progress.tracked(
            {**engine._INSTRUCTION_MAP, **self._entries.instructions}
        )
        engine._exec_schedule = self._exec_schedule
        engine._next_batch = self._twins.next_batch
        engine._aggregate_total_loss = self._aggregate_total_loss
        engine._reduce_outputs = self._reduce_outputs
        engine.save_checkpoint = checkpoint.saver(self._originals["save_checkpoint"], self)
        engine.load_checkpoint = checkpoint.loader(self._originals["load_checkpoint"], self)
        for name in _WATCHED:
            setattr(engine, name, self._liveness.watched(getattr(engine, name)))
        engine.sentinel = self
        self._ours = {name: vars(engine)[name] for name in _SET}

    def _exec_schedule(self, pipe_schedule: schedule.PipeSchedule) -> None:
        run = partial(self._originals["_exec_schedule"], pipe_schedule)
        trains = isinstance(pipe_schedule, schedule.TrainSchedule)
        with self.gate.columns.in_effect():
            try:
                if trains:
                    self.gate.begin_step()
                    self._interception.watching = True
                    self.gate.rehearse(run)
                self._entries.begin()
                run()
            finally:
                self.gate.leave_step()
        self._interception.watching = False
        self._liveness.progress.end_schedule()
        if trains:
            self._entries.check(pipe_schedule, lenient=self._lenient)
            self._after_step()

    def _after_step(self) -> None:
        verdict = self.last_verdict
        assert verdict is not None, "every training step passes the gate"
        unequal = self.comparison.unequal_in(verdict.step)
        self.devices.step(verdict, self.gate.columns.wiring, self.last_poisoned, unequal)
        self._sinks.step(verdict, self.counts)
        if self._convictions.take(verdict, observed=self._lenient):
            # Now, since nobody knows how the run will end.
            self._telling.exclusions(self.write_exclusions)
        if verdict.halt:
            self._halt(verdict)
        if self.gate.decision:
            self._decided(verdict.step, self.gate.decision)

    def _decided(self, step: int, what: Decision) -> None:
        self._telling.decided(step, what)
        if what.action is None or what.action == self.config.action:
            return
        self.config = config = self._with_action(what.action)
        for one in (self._telling, self.gate, self._twins):
            one.go_by(config)
        for of_messages in (self.comparison, self._collector.probe, self._interception):
            of_messages.lenient = self._lenient
        self._liveness.ends = not self._lenient

    @property
    def convicts(self) -> tuple[Convict, ...]:
        """Who is convicted, and where it ran then."""
        return self._convictions.convicts

    def write_exclusions(self) -> Path | None:
        """Write ``exclude.json``, see ``Convictions.write``."""
        return self._convictions.write()

    def _end(self) -> None:
        """The end of a run: what is told once."""
        self._sinks.close()
        self.devices.write()
        self._telling.exclusions(self.write_exclusions)
        self._telling.end(self.engine.global_steps, self.counts, workers_of(self.gate.judge.record.convicted))

    def gather_words(self, *words: int) -> torch.Tensor:
        """int64 [ranks, W]: what every rank says in W whole numbers. Collective."""
        return self._control.gather_words(*words)

    def of_first_stage(self, mine: torch.Tensor) -> torch.Tensor:
        """uint8 [N]: what the first stage's worker of this column says. Collective."""
        return self._control.of_first_stage(mine, checkpoint.MOST_BYTES)

    def _aggregate_total_loss(self) -> torch.Tensor:
        original: Callable[[], torch.Tensor] = self._originals["_aggregate_total_loss"]
        verdict = self.last_verdict
        if verdict is None or not verdict.excluded.any():
            return original()
        return mean_of_included(self.engine, self.gate.share, bool(verdict.excluded.all()), original)

    def _reduce_outputs(self, outputs: Any, reduce: str | None = "avg", reduce_dp: bool = True, **more: Any) -> Any:
        """An evaluation's, in the last stage."""

        def original(outputs: Any) -> Any:
            return self._originals["_reduce_outputs"](outputs, reduce=reduce, reduce_dp=reduce_dp, **more)

        if reduce is None or not reduce_dp or not torch.is_tensor(outputs[0]):
            return original(outputs)
        out_C = self.leave_out_of_evaluation()
        if not out_C.any():
            return original(outputs)
        return mean_without(out_C, self.gate.columns.own, outputs, original)

    def leave_out_of_evaluation(self) -> np.ndarray:
        """Columns that an evaluation is to be without, bool [C], since a convicted worker serves them; said once."""
        # Those of the schedule that comes: where one runs, it is in effect already.
        wiring = self.gate.columns.next
        out_C = np.asarray(np.take_along_axis(self.gate.judge.record.convicted, wiring, axis=1).any(0))
        if self._lenient:
            out_C[:] = False
        if out_C.any() and self.worker == (self.mesh.stages - 1, 0):
            self._telling.left_out_of_evaluation(out_C)
        return out_C

    def _halt(self, verdict: Verdict) -> None:
        machines = "; ".join(map(str, self.convicts))
        without = f" Start again without {machines}: see {FILE} there." if machines else ""
        if machines:
            ends_with(HALTED_EXIT_CODE)
        folder, problem = f"{self.config.output_dir}/halt_checkpoint", None
        self._telling.exclusions(self.write_exclusions)
        try:
            self.engine.save_checkpoint(folder)
            saved = f"Checkpoint without the excluded contributions: {folder}."
        except Exception as error:  # whatever it is, a full disk or a rank that is gone over one, it is not the reason
            problem = error
            saved = f"No checkpoint, or a part of one: {folder} could not be written ({type(error).__name__}: {error})."
        raise SentinelHalt(
            f"training stopped in step {verdict.step}: {verdict.halt}. {saved} See "
            f"{self.config.output_dir}/{EVENTS_FILE}.{without}"
        ) from problem
