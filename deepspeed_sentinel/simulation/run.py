"""A simulated run from the first step to ``result.json``."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.judgement.judge import Judge, JudgeSettings
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.response.dealing import Dealer
from deepspeed_sentinel.response.twins import Draw, draw
from deepspeed_sentinel.simulation.attackers import Attackers, Part, attackers_of, draw_attackers
from deepspeed_sentinel.simulation.data import Text
from deepspeed_sentinel.simulation.evidence import Verifiers
from deepspeed_sentinel.simulation.metrics import Tally
from deepspeed_sentinel.simulation.model import build_stages
from deepspeed_sentinel.simulation.options import SimulationOptions
from deepspeed_sentinel.simulation.paper import PaperJudge
from deepspeed_sentinel.simulation.pipeline import Pass, held_out_loss, train_pass, weights_of
from deepspeed_sentinel.simulation.result import result_of
from deepspeed_sentinel.simulation.watched import WatchedLinks
from deepspeed_sentinel.simulation.weights import WeightHistory

_LEARNING_RATE_WARMUP = 10
_CLIP = 1.0
# Gradients of that many numbers in all may be kept apart by column, so that no column is computed twice.
_KEPT_APART = 2**28
_RATE_JUMP = 5.0


class Simulation:
    """One training run over a whole mesh.

    Args:
        options: what to run.
        riders: attackers of other runs that have all steps before ``start`` in common with this one, and see what
            they would see there. None of them acts here.

    Attributes:
        stages: the model, stage by stage.
        left_out: columns that count in no step, of a run without guard: what a run that lost them is compared with.
        served: int [S, C], who serves which column in this step.
    """

    def __init__(self, options: SimulationOptions, riders: Sequence[Attackers] = ()) -> None:
        self.options = options
        self.mesh = options.mesh
        # A run of a few hundred steps is short; engines stop after ten skipped steps, a simulation shows what follows.
        settings = {
            "seed": options.seed,
            "max_skipped_steps": options.steps,
            "twins": {"every": options.twins_every},
            **options.sentinel,
            **({"wiring": options.wiring} if options.wiring else {}),
            # What its events say of it: whether it is judged is the options' to say, and they have every step.
            "enabled": options.guard == "on",
            "events": "steps",
        }
        self.config = SentinelConfig.parse(settings).of_mesh(self.mesh)
        self.dealer = Dealer.of(self.config, self.mesh)
        self.served = self.dealer.wiring
        self.stages = build_stages(options)
        self.step_index = 0
        self._text = Text(options)
        self.attackers = self.attackers_of(options)
        self.riders = riders
        watching = [*riders, *([self.attackers] if self.attackers else [])]
        self.history = WeightHistory(self.stages, max((one.needs.recompute_steps for one in watching), default=0))
        self.judge: Judge | PaperJudge
        if options.procedure == "paper":
            self.judge = PaperJudge(self.mesh, options.honest_steps, options.directions)
        else:
            chosen = {name: getattr(self.config, name) for name in JudgeSettings.__dataclass_fields__}
            chosen["conviction"] = self.config.convicts_by(self.mesh)
            self.judge = Judge(self.mesh, JudgeSettings(**chosen))
        decays = (self.config.activation_decay, self.config.gradient_decay)
        self.verifiers = Verifiers(self.mesh, decays, options.seed, "paper" in (options.evidence, options.procedure))
        self.tally = Tally(self.mesh)
        self.guarded = options.guard == "on"
        self.left_out: tuple[int, ...] = ()
        self._weights = weights_of(self.stages)
        self._stage_of = [index for index, stage in enumerate(self.stages) for _ in stage.parameters()]
        rate = options.size.learning_rate
        self.optimizer = torch.optim.AdamW(self._weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: self._jump() * min(1.0, (step + 1) / _LEARNING_RATE_WARMUP)
        )
        self._found_at: int | None = None
        self.seconds = {"step": 0.0, "judge": 0.0}
        self.losses: list[float] = []

    @staticmethod
    def attackers_of(options: SimulationOptions) -> Attackers | None:
        """The attackers of a run before its first step; None where nobody tampers."""
        malicious = draw_attackers(options.mesh, options.attackers_per_stage, options.seed)
        for worker in options.attackers:
            malicious[worker] = True
        return attackers_of(options, options.mesh, malicious)

    def skip_text(self, steps: int) -> None:
        """Leave out the batches of so many steps, for a run that goes on from another."""
        for _ in range(steps):
            self._text.next_step()

    def step(self) -> Verdict | None:
        """Train one step; the verdict, or None without a guard."""
        begin = time.perf_counter()
        before, self.served = self.served, self.dealer.wiring
        ids, labels = self._text.next_step()
        self._twins = self._draw_twins()
        if self._twins is not None:
            ids, labels = self._given(ids), self._given(labels)
        never = np.zeros(self.mesh.replicas, bool)
        never[list(self.left_out)] = True
        assert not never.any() or not (self.guarded or self.attackers), "only of a clean run"
        self.verifiers.begin_step(self.step_index, self._met(before), twins=self._twins is not None)
        if self.attackers is not None:
            self.attackers.begin_step(self.judge.record.suspicion > 0)
        passed = self._compute(ids, labels, never, again=False)
        if self.attackers is not None and self.attackers.needs.alters_gradients:
            gradients = self.attackers.tamper_gradients(self.step_index, self.served, passed.gradients, self._stage_of)
            passed = replace(passed, gradients=gradients)
        verdict = self._judge(passed) if self.guarded else None
        excluded = never if verdict is None else verdict.excluded
        losses_CM = passed.losses_CM
        if verdict is not None and excluded.any() and not excluded.all():
            if passed.gradients:
                losses_CM = losses_CM[torch.from_numpy(~excluded).to(losses_CM.device)]
            else:
                self.optimizer.zero_grad()
                losses_CM = self._compute(ids, labels, excluded, again=True).losses_CM
        self._take_gradients(passed, excluded)
        self.history.put()
        for attackers in (*self.riders, *([self.attackers] if self.attackers else [])):
            attackers.end_step(self.step_index)
        if not excluded.all():
            self._update(losses_CM.numel())
            self.losses.append(float(losses_CM.mean()))
        self.optimizer.zero_grad()
        wiring = self.dealer.next(self.step_index, self.judge.doubts)
        if verdict is not None:
            verdict = replace(verdict, wiring=wiring)
            acted = self.acted_first()
            altered = self.attackers.altered if self.attackers else ()
            self.tally.add(verdict, self.served, acted >= 0, altered)
        self.step_index += 1
        self.seconds["step"] += time.perf_counter() - begin
        return verdict

    def run(self, each_step: Callable[[Verdict | None], None] = lambda verdict: None) -> dict[str, Any]:
        """Train all steps; the contents of ``result.json``, in which only this run's own loss is set."""
        while self.step_index < self.options.steps and not self._all_found():
            each_step(self.step())
        return result_of(self)

    def _all_found(self) -> bool:
        """Whether all who tamper were convicted ``stop_after`` steps ago."""
        if (
            not self.options.stop_after
            or self.attackers is None
            or (self.attackers.malicious & ~self.tally.convicted).any()
        ):
            return False
        if self._found_at is None:
            self._found_at = self.step_index
        return self.step_index >= self._found_at + self.options.stop_after

    def held_out_loss(self) -> float:
        """Loss on held-out text, in nats a token."""
        return held_out_loss(self.stages, *self._text.held_out(), at_once=16)

    def _met(self, before: np.ndarray) -> np.ndarray | None:
        """Pairs of workers that stand beside a stage now and did not in the last step, bool [S, C]."""
        if self.config.wiring == "shuffle":
            return None
        moved, met = self.served != before, np.zeros(before.shape, bool)
        met[1:-1] = moved[:-2] | moved[2:]
        return met

    def _jump(self) -> float:
        """By how much the learning rate of the next step is above the schedule's."""
        jumped = self.options.change == "rate" and self.step_index + 1 >= self.options.change_at
        return _RATE_JUMP if jumped else 1.0

    def acted_first(self) -> np.ndarray:
        """The first step in which each worker tampered, int [S, R]; -1 for never."""
        if self.attackers is None:
            return np.full((self.mesh.stages, self.mesh.replicas), -1)
        return self.attackers.acted_first

    @property
    def _apart(self) -> bool:
        """Whether columns may soon be left out, and all of their gradients fit into memory."""
        attacked = self.attackers is not None and self.step_index >= self.options.start
        attacked &= self.guarded or (self.attackers is not None and self.attackers.needs.alters_gradients)
        return (attacked or self._twins is not None) and self.mesh.replicas * sum(
            map(torch.Tensor.numel, self._weights)
        ) <= _KEPT_APART

    def _compute(self, ids: torch.Tensor, labels: torch.Tensor, excluded: np.ndarray, again: bool) -> Pass:
        """Gradients of the columns that are not excluded, summed over messages."""
        columns = np.flatnonzero(~excluded)
        ids, labels = ids[columns], labels[columns]
        at_once = self.options.chunk or self.options.micro_batches
        passes = []
        for first in range(0, self.options.micro_batches, at_once):
            micro_batches = range(first, min(first + at_once, self.options.micro_batches))
            part = Part(tuple(columns.tolist()), tuple(micro_batches), again)
            chosen = slice(micro_batches.start, micro_batches.stop)
            links = WatchedLinks(self, part)
            apart = self._apart and not again
            passes.append(train_pass(self.stages, ids[:, chosen], labels[:, chosen], links, apart))
        by_column = tuple(
            tuple(_sum(parts) for parts in zip(*of_column, strict=True))
            for of_column in zip(*(one.gradients for one in passes), strict=True)
        )
        return Pass(torch.cat([one.losses_CM for one in passes], dim=1), by_column)

    def _take_gradients(self, passed: Pass, excluded: np.ndarray) -> None:
        """Where columns were kept apart, add up those that count; otherwise gradients lie there already."""
        if not passed.gradients:
            return
        counted = [passed.gradients[column] for column in np.flatnonzero(~excluded).tolist()]
        for weight, parts in zip(self._weights, zip(*counted, strict=True), strict=False):
            weight.grad = _sum(parts)

    def _draw_twins(self) -> Draw | None:
        """Whose micro-batches which columns are given in this step, or None."""
        if not self.guarded or self.options.procedure == "paper":
            return None
        secret = int(np.random.default_rng((self.options.seed, self.step_index, 3)).integers(1 << 62))
        return draw(self.config, self.mesh.replicas, self.judge.record.suspicion, secret)

    def _given(self, own_CMBT: torch.Tensor) -> torch.Tensor:
        """What the columns get in a twin step."""
        assert self._twins is not None
        given = torch.from_numpy(self._twins.given).to(own_CMBT.device)
        return torch.where(given[:, None, None, None], own_CMBT[self._twins.source], own_CMBT)

    def _told_of_twins(self, passed: Pass) -> Twins | None:
        """What is told of a twin step, and what each worker has accumulated in it."""
        if self._twins is None:
            return None
        if not passed.gradients:
            raise ValueError(
                f"{self.mesh.replicas} columns of {sum(map(torch.Tensor.numel, self._weights))} weights are too many "
                "to keep their gradients apart, as a twin step takes; use a smaller model or fewer replicas"
            )
        marks_SR = np.zeros((self.mesh.stages, self.mesh.replicas), np.int64)
        for column, gradients in enumerate(passed.gradients):
            marks = [1] * self.mesh.stages
            for stage, gradient in zip(self._stage_of, gradients, strict=True):
                if gradient is not None:
                    marks[stage] = zlib.crc32(gradient.cpu().contiguous().view(torch.uint8).numpy().data, marks[stage])
            marks_SR[np.arange(self.mesh.stages), self.served[:, column]] = np.array(marks) + 1
        # One process computes all, so there is one kind of hardware, and nothing is held by norms.
        alike = np.zeros_like(marks_SR)
        return Twins(self._twins.source, self._twins.given, marks_SR, alike.astype(np.float64), alike)

    def _judge(self, passed: Pass) -> Verdict:
        begin = time.perf_counter()
        evidence = self.verifiers.evidence(self.step_index, self.served, self._told_of_twins(passed))
        if self.config.wiring == "shuffle":
            evidence = replace(evidence, renewed=None)
        verdict = self.judge.step(evidence)
        if self.judge.clean_links.any():
            self.verifiers.learn(self.judge.clean_links)
        self.seconds["judge"] += time.perf_counter() - begin
        return verdict

    def _update(self, messages: int) -> None:
        for weight in self._weights:
            if weight.grad is not None:
                weight.grad.div_(messages)
        torch.nn.utils.clip_grad_norm_(self._weights, _CLIP)
        self.optimizer.step()
        self.schedule.step()


def _sum(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    known = [part for part in parts if part is not None]
    if len(known) < 2:
        return known[0] if known else None
    total = known[0] + known[1]
    for part in known[2:]:
        total += part
    return total
