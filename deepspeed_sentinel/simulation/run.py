"""A simulated run from the first step to ``result.json``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from deepspeed_sentinel.attacks.base import Needs
from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.judgement.judge import Judge, JudgeSettings
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import FORWARD
from deepspeed_sentinel.simulation.attackers import Part, attackers_of
from deepspeed_sentinel.simulation.data import Text
from deepspeed_sentinel.simulation.evidence import Verifiers
from deepspeed_sentinel.simulation.metrics import Tally
from deepspeed_sentinel.simulation.model import build_stages
from deepspeed_sentinel.simulation.options import SimulationOptions
from deepspeed_sentinel.simulation.pipeline import held_out_loss, train_pass
from deepspeed_sentinel.simulation.routing import deal_columns, draw_attackers
from deepspeed_sentinel.simulation.weights import WeightHistory

_LEARNING_RATE_WARMUP = 10
_CLIP = 1.0


class Simulation:
    """One training run over a whole mesh.

    Args:
        options: what to run.

    Attributes:
        stages: the model, stage by stage.
        verdicts: called with every verdict, if set.
    """

    def __init__(self, options: SimulationOptions) -> None:
        self.options = options
        self.mesh = options.mesh
        # A run of a few hundred steps is short; engines stop after ten skipped steps, a simulation shows what follows.
        settings = {"seed": options.seed, "max_skipped_steps": options.steps, **options.sentinel}
        self.config = SentinelConfig.parse(settings)
        self.stages = build_stages(options)
        self._text = Text(options)
        malicious = draw_attackers(self.mesh, options.attackers_per_stage, options.seed)
        for worker in options.attackers:
            malicious[worker] = True
        self.attackers = attackers_of(options, self.mesh, malicious)
        needs = self.attackers.needs if self.attackers else Needs()
        self._history = WeightHistory(self.stages, needs.recompute_steps)
        fields = JudgeSettings.__dataclass_fields__
        self.judge = Judge(self.mesh, JudgeSettings(**{name: getattr(self.config, name) for name in fields}))
        decays = (self.config.activation_decay, self.config.gradient_decay)
        self.verifiers = Verifiers(self.mesh, decays, options.seed, options.evidence == "paper")
        self.tally = Tally(self.mesh)
        self.guarded = options.guard == "on"
        weights = [weight for stage in self.stages for weight in stage.parameters()]
        rate = options.size.learning_rate
        self._optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min(1.0, (step + 1) / _LEARNING_RATE_WARMUP)
        )
        self.step_index = 0
        self.seconds = {"step": 0.0, "judge": 0.0}
        self.losses: list[float] = []

    def step(self) -> Verdict | None:
        """Train one step; the verdict, or None without a guard."""
        begin = time.perf_counter()
        self._served = deal_columns(self.mesh, self.judge.record.convicted, self.options.seed, self.step_index)
        ids, labels = self._text.next_step()
        everybody = np.zeros(self.mesh.replicas, bool)
        self.verifiers.begin_step(self.step_index)
        losses_CM = self._compute(ids, labels, everybody, again=False)
        verdict = self._judge() if self.guarded else None
        excluded = everybody if verdict is None else verdict.excluded
        if excluded.any() and not excluded.all():
            self._optimizer.zero_grad()
            losses_CM = self._compute(ids, labels, excluded, again=True)
        self._history.put()
        if self.attackers is not None:
            self.attackers.end_step(self.step_index)
        if not excluded.all():
            self._update(losses_CM.numel())
            self.losses.append(float(losses_CM.mean()))
        self._optimizer.zero_grad()
        if verdict is not None:
            acted = self._acted_first()
            self.tally.add(verdict, self._served, acted >= 0)
        self.step_index += 1
        self.seconds["step"] += time.perf_counter() - begin
        return verdict

    def run(self, each_step: Callable[[Verdict | None], None] = lambda verdict: None) -> dict[str, Any]:
        """Train all steps; the contents of ``result.json``, in which only this run's own loss is set."""
        begin = time.perf_counter()
        while self.step_index < self.options.steps:
            each_step(self.step())
        loss = self.held_out_loss()
        return self.result(loss, time.perf_counter() - begin)

    def held_out_loss(self) -> float:
        """Loss on held-out text, in nats a token."""
        return held_out_loss(self.stages, *self._text.held_out(), at_once=16)

    def result(self, loss: float, seconds: float) -> dict[str, Any]:
        options = self.options
        kind = "clean" if self.attackers is None and not self.guarded else "guarded" if self.guarded else "attacked"
        return {
            "mesh": {"stages": self.mesh.stages, "replicas": self.mesh.replicas},
            "attack": {
                "name": options.attack,
                "arguments": options.attack_arguments,
                "direction": options.direction,
                "malicious_share": options.malicious,
                "start": options.start,
            },
            **self.tally.result(self._acted_first()),
            "loss": {"clean": None, "attacked": None, "guarded": None, kind: finite(loss)},
            "seconds": seconds,
            "details": {
                "steps": options.steps,
                "seed": options.seed,
                "model": options.model,
                "moe": options.moe,
                "parameters": sum(weight.numel() for stage in self.stages for weight in stage.parameters()),
                "tokens_per_message": options.micro_batch_size * options.sequence,
                "micro_batches": options.micro_batches,
                "verifier": options.verifier,
                "evidence": options.evidence,
                "guard": options.guard,
                "skipped_steps": self.tally.skipped_steps,
                "excluded_columns": self.tally.excluded_columns,
                "disputes": self.tally.disputes,
                "seconds_a_step": self.seconds["step"] / max(self.step_index, 1),
                "judge_seconds_a_step": self.seconds["judge"] / max(self.step_index, 1),
            },
        }

    def _acted_first(self) -> np.ndarray:
        if self.attackers is None:
            return np.full((self.mesh.stages, self.mesh.replicas), -1)
        return self.attackers.acted_first

    def _compute(self, ids: torch.Tensor, labels: torch.Tensor, excluded: np.ndarray, again: bool) -> torch.Tensor:
        """Gradients of the columns that are not excluded, summed over messages; their losses [C, M]."""
        columns = np.flatnonzero(~excluded)
        ids, labels = ids[columns], labels[columns]
        at_once = self.options.chunk or self.options.micro_batches
        losses = []
        for first in range(0, self.options.micro_batches, at_once):
            micro_batches = range(first, min(first + at_once, self.options.micro_batches))
            part = Part(tuple(columns.tolist()), tuple(micro_batches), again)
            chosen = slice(micro_batches.start, micro_batches.stop)
            links = _WatchedLinks(self, part)
            losses.append(train_pass(self.stages, ids[:, chosen], labels[:, chosen], links))
        return torch.cat(losses, dim=1)

    def _judge(self) -> Verdict:
        begin = time.perf_counter()
        evidence = self.verifiers.evidence(self.step_index, self._served)
        verdict = self.judge.step(evidence)
        self.verifiers.learn(self.judge.clean_columns)
        self.seconds["judge"] += time.perf_counter() - begin
        return verdict

    def _update(self, messages: int) -> None:
        weights = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        for weight in weights:
            if weight.grad is not None:
                weight.grad.div_(messages)
        torch.nn.utils.clip_grad_norm_(weights, _CLIP)
        self._optimizer.step()
        self._schedule.step()


class _WatchedLinks:
    """What stands on the links in one pass: attackers before, verifiers behind."""

    def __init__(self, simulation: Simulation, part: Part) -> None:
        self._simulation = simulation
        self._part = part
        # Only attackers that compute with old weights need what entered their stage forward.
        self._keeps = simulation.attackers is not None and simulation.attackers.needs.recompute_steps > 0
        self._entered_forward: dict[int, torch.Tensor] = {}

    def cross(
        self, direction: int, link: int, sent_CMBTD: torch.Tensor, entered_CMBTD: torch.Tensor | None
    ) -> torch.Tensor:
        simulation, part = self._simulation, self._part
        sender = simulation.mesh.sender_stage(direction, link)
        if self._keeps and direction == FORWARD and entered_CMBTD is not None:
            self._entered_forward[sender] = entered_CMBTD
        crossed = sent_CMBTD
        if simulation.attackers is not None and entered_CMBTD is not None:
            crossed = simulation.attackers.tamper(
                direction, sender, simulation.step_index, part, simulation._served, sent_CMBTD, entered_CMBTD,
                lambda way, stage, column, micro_batch, k: self._recompute(
                    way, stage, (column, micro_batch), entered_CMBTD, k
                ),
            )  # fmt: skip
        if simulation.guarded and not part.again:
            simulation.verifiers.observe(direction, link, *self._reported(direction, link, sent_CMBTD, crossed))
        return crossed

    def _reported(
        self, direction: int, link: int, honest: torch.Tensor, crossed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """On what senders and receivers report: what crossed, unless receivers are asked and lie."""
        simulation, part = self._simulation, self._part
        attackers = simulation.attackers
        if attackers is None or simulation.options.verifier == "trusted":
            return crossed, crossed
        step, served = simulation.step_index, simulation._served
        sender = simulation.mesh.sender_stage(direction, link)
        receiver = simulation.mesh.receiver_stage(direction, link)
        claimed = attackers.false_reports(direction, receiver, step, part, served, crossed)
        vouched_CM = attackers.vouched(sender, receiver, direction, step, part, served).to(crossed.device)
        if not vouched_CM.any():
            return crossed, claimed
        vouched = vouched_CM[:, :, None, None, None]
        return torch.where(vouched, honest, crossed), torch.where(vouched, honest, claimed)

    def _recompute(
        self, direction: int, stage: int, at: tuple[int, int], entered_CMBTD: torch.Tensor, k: int
    ) -> torch.Tensor | None:
        activation = self._entered_forward[stage][at]
        gradient = None if direction == FORWARD else entered_CMBTD[at]
        return self._simulation._history.recompute(direction, stage, activation, gradient, k)


def finite(value: float) -> float | None:
    """``value``, or None where it is not finite: JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
