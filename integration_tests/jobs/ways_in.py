"""Attaching, detaching, and everything that must be refused, on live engines in one job of 2 stages x 2 replicas.

Writes JOB_FOLDER/<rank>.json: {case: what happened}; see test_ways_in.py for the cases.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology, ProcessTopology

import deepspeed_sentinel
from deepspeed_sentinel.engine import access
from deepspeed_sentinel.evidence.probe import Probe
from integration_tests.models import build_model, micro_batches
from integration_tests.scenario import Scenario

SCENARIO = Scenario(name="ways_in", layers_per_stage=2)
FOLDER = Path(os.environ["JOB_FOLDER"])
observed = 0


def count_observations() -> None:
    honest = Probe.observe

    def observe(self: Probe, *arguments: Any) -> None:
        global observed
        observed += 1
        honest(self, *arguments)

    Probe.observe = observe  # type: ignore[method-assign]


def initialize(sentinel: Any, stages: int = 2, of: Callable[..., Any] = deepspeed_sentinel.initialize) -> Any:
    model = build_model(SCENARIO, stages)
    config = SCENARIO.deepspeed_config()
    if sentinel is not None:
        config["sentinel"] = sentinel
    return of(model=model, model_parameters=list(model.parameters()), config=config)


def train(engine: Any, steps: range) -> list[float]:
    replica = engine.grid.get_data_parallel_id()
    return [float(engine.train_batch(micro_batches(SCENARIO, step, replica))) for step in steps]


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "was accepted"


def block(**changes: Any) -> dict[str, Any]:
    return {"enabled": True, "output_dir": str(FOLDER / "logs"), **changes}


def cases() -> dict[str, Any]:
    result: dict[str, Any] = {}
    count_observations()
    returned = initialize(None, of=deepspeed.initialize)
    plain = returned[0]
    result["returns"] = len(returned)
    untouched = set(vars(plain))
    result["plain"] = train(plain, range(4))

    disabled = initialize({"enabled": False})
    result["disabled_attributes"] = sorted(set(vars(disabled[0])) ^ untouched)
    result["disabled_returns"] = len(disabled)
    result["disabled"] = train(disabled[0], range(4))
    result["disabled_observed"] = observed

    engine = initialize(None)[0]
    losses = train(engine, range(1))
    engine.load_checkpoint = lambda *_, **__: "the script's own"
    passes: list[int] = []
    forward = engine._INSTRUCTION_MAP[schedule.ForwardPass]

    def counted(*arguments: Any, **options: Any) -> None:
        passes.append(1)
        forward(*arguments, **options)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.ForwardPass: counted}
    before = dict(vars(engine))
    handle = deepspeed_sentinel.attach(engine, block())
    result["attached_is_handle"] = engine.sentinel is handle
    result["attached_once"] = deepspeed_sentinel.attach(engine, block()) is handle
    result["twice"] = refusal(lambda: deepspeed_sentinel.attach(engine, block(strikes=4)))
    losses += train(engine, range(1, 3))
    result["attached_observed"] = observed
    result["own_instruction_runs"] = len(passes) == 2 * SCENARIO.micro_batches
    engine.save_checkpoint = lambda *_, **__: "set while attached"
    handle.detach()
    handle.detach()
    result["detached_attributes"] = sorted(set(vars(engine)) ^ set(before))
    scripts = ("load_checkpoint", "_INSTRUCTION_MAP")
    result["still_the_scripts"] = all(vars(engine)[name] is before[name] for name in scripts)
    result["set_meanwhile"] = engine.save_checkpoint()
    losses += train(engine, range(3, 4))
    result["detached"] = losses
    result["detached_observed"] = observed

    result["no_settings"] = refusal(lambda: deepspeed_sentinel.attach(engine))
    guarded = initialize(block(), of=deepspeed.initialize)[0]  # the flag, then the script's own
    result["flag"] = deepspeed_sentinel.attach(guarded) is guarded.sentinel
    # Another tool's own step, which calls the engine's and not the entry that it found.
    guarded._INSTRUCTION_MAP = {**guarded._INSTRUCTION_MAP, schedule.OptimizerStep: type(plain)._exec_optimizer_step}
    result["taken"] = refusal(lambda: train(guarded, range(1)))
    guarded.sentinel.detach()
    result["unknown_key"] = refusal(lambda: initialize(block(warmup=3)))
    result["outside_mesh"] = refusal(
        lambda: initialize(block(inject=[{"stage": 7, "replica": 0, "attack": "constant"}]))
    )
    (FOLDER / "a_file").write_text("in the way", encoding="utf-8")
    result["unwritable"] = refusal(lambda: initialize(block(output_dir=str(FOLDER / "a_file" / "logs"))))
    result["one_stage"] = refusal(lambda: initialize(block(), stages=1))
    result["stages_do_not_divide"] = refusal(lambda: initialize(block(), stages=3))

    linear = torch.nn.Linear(2, 2)
    result["no_pipeline"] = refusal(
        lambda: deepspeed_sentinel.initialize(
            model=linear,
            model_parameters=list(linear.parameters()),
            config={**SCENARIO.deepspeed_config(), "sentinel": block()},
        )
    )

    def with_topology(topology: ProcessTopology) -> Any:
        layers = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
        model = deepspeed.pipe.PipelineModule(layers=layers, topology=topology, loss_fn=torch.nn.MSELoss())
        return deepspeed_sentinel.initialize(
            model=model,
            model_parameters=list(model.parameters()),
            config={**SCENARIO.deepspeed_config(), "sentinel": block()},
        )[0]

    result["tensor_parallel"] = refusal(lambda: with_topology(PipeModelDataParallelTopology(2, 2, 1)))
    for name, topology in {
        "three_axes": PipeModelDataParallelTopology(num_pp=2, num_mp=1, num_dp=2),
        "other_axes": ProcessTopology(axes=["data", "sequence", "pipe"], dims=[2, 1, 2]),
    }.items():
        engine = with_topology(topology)
        data = iter([(torch.ones(2, 2), torch.zeros(2, 2))] * SCENARIO.micro_batches)
        loss = float(engine.train_batch(data))
        result[name] = [loss == loss, engine.sentinel.last_verdict.judged, access.ranks_of(engine).tolist()]
        engine.sentinel.detach()
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = torch.distributed.get_rank()
    (FOLDER / f"{rank}.json").write_text(json.dumps(cases()), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
