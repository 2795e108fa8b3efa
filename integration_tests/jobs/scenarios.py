"""Job script: runs a list of scenarios, one after the other, in one set of processes.

    scenarios.py --plan plan.json --output DIRECTORY --stages S

Each rank writes DIRECTORY/<rank>.json: {"rank", "stage", "replica", "seconds", "scenarios": {name: ...}},
rewritten after every scenario so that a killed job leaves what was done, and DIRECTORY/<name>.<rank>.pt.
An error ends the job with exit code 1 (messages may still be under way), except where it was expected.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

STARTED = time.time()

import deepspeed  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402

from integration_tests.scenario import Scenario  # noqa: E402


def digest(value: Any) -> str:
    """sha256 over every tensor and number in a nested structure, in order, with dtypes and shapes."""
    sha = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            sha.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key, item in part.items():
                sha.update(str(key).encode())
                add(item)
        elif isinstance(part, (list, tuple)):
            for item in part:
                add(item)
        elif isinstance(part, (bool, int, float, str, type(None))):
            sha.update(repr(part).encode())

    add(value)
    return sha.hexdigest()


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in sorted(engine.module.named_parameters())}


def masters_of(engine: Any) -> list[torch.Tensor]:
    """The fp32 copies that the optimizer steps, where the precision has them."""
    for name in ("fp32_groups_flat_partition", "fp32_groups", "single_partition_of_fp32_groups"):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return []


def plain(value: Any) -> Any:
    """JSON for what a verdict holds."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


FINDING = (
    "worker", "direction", "link", "column", "micro_batch", "statistic", "value", "score", "trusted", "part", "strikes",
)  # fmt: skip
DISPUTE = ("direction", "link", "column", "sender", "receiver", "about", "micro_batches", "audit", "at_fault")


def summary(verdict: Any) -> dict[str, Any] | None:
    """A verdict without its large arrays; findings and disputes as dicts, workers as [stage, replica]."""
    if verdict is None:
        return None
    whole = ("step", "warming_up", "judged", "excluded", "convicted", "worker_scores", "skip", "overflow", "halt")
    return {
        **{name: plain(getattr(verdict, name)) for name in whole},
        "alarms": int(verdict.alarms.sum()),
        "alarmed": plain(np.argwhere(verdict.alarms)),
        "disputes": plain(np.argwhere(verdict.disputes)),
        "findings": [{name: plain(getattr(one, name)) for name in FINDING} for one in verdict.findings],
        "disputed": [{name: plain(getattr(one, name)) for name in DISPUTE} for one in verdict.disputed],
        "twins": verdict.twins,
        "alike": plain(verdict.alike),
        "proofs": [plain(proof.worker) for proof in verdict.proofs],
        "differences": [plain(difference.workers) for difference in verdict.differences],
        "cleared": plain(verdict.cleared),
        "suspects": plain(np.argwhere(verdict.suspects)),
        "wiring": plain(verdict.wiring),
        "newly_convicted": plain(verdict.newly_convicted),
        "released": plain(verdict.released),
        "digest": verdict.digest() if hasattr(verdict, "digest") else None,
    }


def run(scenario: Scenario, stages: int, output: Path, result: dict[str, Any]) -> None:
    """Train one scenario and record into ``result`` as it goes."""
    clock = time.perf_counter()
    initialize = deepspeed.initialize
    if scenario.sentinel is not None:
        import deepspeed_sentinel

        initialize = deepspeed_sentinel.initialize
    if scenario.precision.startswith("fp16"):
        # DeepSpeed asks for a CPU with fast fp16; torch computes in fp16 on every CPU, which is enough here
        get_accelerator().is_fp16_supported = lambda: True
    models = importlib.import_module(scenario.models)
    model = models.build_model(scenario, stages)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = initialize(model=model, model_parameters=parameters, config=scenario.deepspeed_config())
    if scenario.tuple_messages == "bool_cast":
        engine.has_bool_tensors = True
    if scenario.load is not None:
        path, _ = engine.load_checkpoint(scenario.load["directory"])
        result["loaded"] = path
    result["build_seconds"] = time.perf_counter() - clock
    sentinel = getattr(engine, "sentinel", None)
    result["optimizer"] = type(engine.optimizer).__name__
    result["watched"] = sentinel is not None
    replica = engine.grid.get_data_parallel_id()
    data_replica = replica if scenario.data_replicas is None else scenario.data_replicas[replica]
    hook = None
    if scenario.hook is not None:
        module, function = scenario.hook.split(":")
        hook = getattr(importlib.import_module(module), function)

    saves = [scenario.save] if isinstance(scenario.save, dict) else scenario.save or ()
    result.update(
        losses=[], steps=[], verdicts=[], poisoned=[], evaluations={}, step_seconds=[], first_step=engine.global_steps
    )
    for step in range(engine.global_steps, scenario.steps):
        print(f"{scenario.name}: step {step}", flush=True)
        if hook is not None:
            hook(engine, step)
        if scenario.reset_shape:
            engine.reset_activation_shape()
        clock = time.perf_counter()
        loss = engine.train_batch(models.micro_batches(scenario, step, data_replica))
        result["step_seconds"].append(time.perf_counter() - clock)
        result["losses"].append(float(loss).hex())
        if sentinel is not None:
            result["verdicts"].append(summary(sentinel.last_verdict))
            result["poisoned"].append(str(sentinel.last_poisoned) if sentinel.last_poisoned else "")
        if scenario.evaluate_every and (step + 1) % scenario.evaluate_every == 0:
            held_out = models.micro_batches(scenario, 1_000_000 + step, data_replica)
            result["evaluations"][step] = float(engine.eval_batch(held_out)).hex()
        for save in saves:
            if step + 1 == save["after_step"]:
                engine.save_checkpoint(save["directory"])
    weights = weights_of(engine)
    torch.save(weights, output / f"{scenario.name}.{torch.distributed.get_rank()}.pt")
    result["weights_sha256"] = digest(weights)
    buffers = [buffer.detach() for buffer in engine.module.buffers() if buffer.numel()]
    result["buffers_sha256"] = digest(buffers)
    result["buffers_largest"] = float(
        torch.stack([buffer.abs().max().float() for buffer in buffers] or [torch.zeros(())]).max()
    )
    result["masters_sha256"] = digest(masters_of(engine))
    result["global_steps"], result["skipped_steps"] = engine.global_steps, engine.skipped_steps
    if scenario.precision.startswith("fp16"):
        result["loss_scale"] = float(engine.optimizer.loss_scale)
    if sentinel is not None:
        result["counts"] = dict(sentinel.counts)
        sentinel.detach()
    engine.destroy()


def groups() -> set[Any]:
    return set(torch.distributed.distributed_c10d._world.pg_map)


def end_groups(before: set[Any]) -> None:
    """Destroy the groups that a run has made: each of gloo's has a thread that wakes up a hundred times a second."""
    kept = list(vars(deepspeed.utils.groups).values())  # DeepSpeed's own, for all engines of a process
    for group in groups() - before:
        if not any(group is one for one in kept):
            torch.distributed.destroy_process_group(group)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stages", type=int, required=True)
    parser.add_argument("--group-timeout", type=float, default=60.0, help="seconds until a collective gives up")
    options = parser.parse_args()
    imported = time.time()
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        timeout=timedelta(seconds=options.group_timeout),
    )
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    replicas = size // options.stages
    record: dict[str, Any] = {
        "rank": rank,
        "stage": rank // replicas,
        "replica": rank % replicas,
        "seconds": {"import": imported - STARTED, "connect": time.time() - imported},
        "scenarios": {},
    }

    def write() -> None:
        partial = options.output / f"{rank}.json.partial"
        partial.write_text(json.dumps(record), encoding="utf-8")
        os.replace(partial, options.output / f"{rank}.json")

    for fields in json.loads(options.plan.read_text(encoding="utf-8")):
        scenario = Scenario.from_json(fields)
        result: dict[str, Any] = {"error": None}
        record["scenarios"][scenario.name] = result
        clock, before = time.perf_counter(), groups()
        try:
            run(scenario, options.stages, options.output, result)
        except Exception as error:
            result["error"] = {
                "type": type(error).__name__,
                "message": str(error),
                "traceback": traceback.format_exc(),
            }
            traceback.print_exc()
        result["seconds"] = time.perf_counter() - clock
        write()
        if result["error"] is not None and not scenario.expect_error:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # threads of a broken group would keep the process
        gc.collect()
        if result["error"] is None:
            end_groups(before)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
