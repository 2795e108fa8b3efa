"""One training run of the small pipeline, with some tools and perhaps a fault; on each rank."""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass, field
from typing import Any

# SCOUT finds no embedding and no output in DeepSpeed's PipelineModule. Then it is ready in no step, replays nothing
# at all, and calls that an inconclusive "sdc".
RECIPES = {"embedding_check_interval": 0, "output_check_interval": 0}


@dataclass(frozen=True)
class Tools:
    """What is on.

    Attributes:
        sentinel: its block; None without it.
        scout: steps from one check of SCOUT to the next; 0 without it.
        recipes: SCOUT's settings, but for the interval.
    """

    sentinel: dict[str, Any] | None = None
    scout: int = 0
    recipes: dict[str, Any] = field(default_factory=lambda: RECIPES)


class Run:
    """One training run with some tools and perhaps a fault.

    Attributes:
        found: of this rank, [{"tool", "step", "what", "named": [[stage, replica], ...]}].
        seconds: of each step.
        entered: on the culprit, steps in which the fault went into the reduction, and the step was taken.
    """

    def __init__(self, arguments: argparse.Namespace, tools: Tools, fault: Any | None) -> None:
        import deepspeed
        import torch

        from integration_tests.models import build_model
        from integration_tests.scenario import Scenario

        self.scenario = Scenario(
            name="peers",
            steps=arguments.steps,
            lengths=(arguments.sequence,),
            hidden=arguments.hidden,
            layers_per_stage=arguments.layers,
        )
        model = build_model(self.scenario, arguments.stages)
        config = self.scenario.deepspeed_config()
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
        grid = self.engine.grid
        self.replica, self.replicas = grid.get_data_parallel_id(), grid.get_data_parallel_world_size()
        culprit = (arguments.stages // 2, self.replicas - 1)
        self.fault = fault if (self.engine.stage_id, self.replica) == culprit else None
        self.start, self.rank = arguments.start, torch.distributed.get_rank()
        self.found: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.entered = 0
        self._adds = False
        self._scout = self._with_scout(tools) if tools.scout else None
        self._sentinel = self._with_sentinel(tools.sentinel) if tools.sentinel is not None else None

    def _with_scout(self, tools: Tools) -> Any:
        import torch
        from lm_resiliency.detection.replay_harness import ReplayHarnessConfig
        from lm_resiliency.detection.reports import replay_fault_reports
        from lm_resiliency.integrations.deepspeed import enable_resiliency

        def found(result: Any) -> None:
            for report in replay_fault_reports(result):
                named = [divmod(rank, self.replicas) for rank in report["failed_ranks"] if report["scope"] == "rank"]
                what = [report["kind"], *report.get("sources", ())]
                self._note("scout", what, named if report["kind"] == "sdc" else [])

        return enable_resiliency(
            self.engine,
            interval=tools.scout,
            enable_checkpoint=False,
            detection_config=ReplayHarnessConfig(**tools.recipes),
            device=torch.device(self.engine.device),
            fault_callback=found,
        )

    def _with_sentinel(self, block: dict[str, Any]) -> Any:
        import deepspeed_sentinel

        return deepspeed_sentinel.attach(self.engine, {"events": "none", "seed": 1, **block})

    def _note(self, tool: str, what: list[str], named: Any) -> None:
        self.found.append(
            {"tool": tool, "step": len(self.seconds), "what": what, "named": [list(one) for one in named]}
        )

    def _read_sentinel(self) -> None:
        verdict = self._sentinel.last_verdict
        seen = {
            "alarm": verdict.findings,
            "dispute": verdict.disputed,
            "proof": verdict.proofs,
            "difference": verdict.differences,
            "reduction": self._sentinel.last_poisoned,
            "weights": self._sentinel.comparison.unequal_in(verdict.step),
            "conviction": verdict.newly_convicted,
        }
        if any(seen.values()):
            self._note("sentinel", [name for name, one in seen.items() if one], verdict.newly_convicted)

    def _watch_reduction(self) -> None:
        reduce = self.engine.allreduce_gradients

        def watched(**options: Any) -> None:
            self._adds = any(bool(parameter.grad.count_nonzero()) for parameter in self.engine.module.parameters())
            reduce(**options)

        self.engine.allreduce_gradients = watched

    def train(self, steps: int) -> None:
        import torch

        from integration_tests.models import micro_batches

        if self.fault:
            self._watch_reduction()
        undo = None
        for step in range(steps):
            if self.fault and step == self.start:
                undo = self.fault.put_in(self.engine)
            torch.distributed.barrier()
            self._adds, skipped, begin = False, self.engine.skipped_steps, time.perf_counter()
            float(self.engine.train_batch(micro_batches(self.scenario, step, self.replica)))
            seconds = time.perf_counter() - begin
            if undo:
                self.entered += self._adds and self.engine.skipped_steps == skipped
                if not self.fault.lasts:
                    undo, _ = None, undo()
            if self._sentinel and self.rank == 0:
                self._read_sentinel()
            self.seconds.append(seconds)

    def weights(self) -> Any:
        import torch

        return torch.cat([parameter.detach().float().flatten() for parameter in self.engine.module.parameters()])

    def close(self) -> None:
        if self._sentinel:
            self._sentinel.detach()
        if self._scout:
            self._scout.close()
        self.engine.destroy()
        gc.collect()


def gathered(value: Any) -> list[Any]:
    import torch

    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone
