"""A user's own training script: plain DeepSpeed, nothing of Sentinel in it. The config file alone decides.

    train.py --deepspeed_config FILE [--stages S] [--steps N]

Writes JOB_FOLDER/<rank>.json: {"losses", "instructions_wrapped", "finite"}.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import deepspeed
import torch

from integration_tests.models import build_model, micro_batches
from integration_tests.scenario import Scenario


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    deepspeed.add_config_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    scenario = Scenario(name="train")
    model = build_model(scenario, arguments.stages)
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=list(model.parameters()))
    replica = engine.grid.get_data_parallel_id()
    losses = [float(engine.train_batch(micro_batches(scenario, step, replica))) for step in range(arguments.steps)]
    result = {
        "losses": losses,
        "instructions_wrapped": "_INSTRUCTION_MAP" in vars(engine),
        "finite": all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()),
    }
    file = Path(os.environ["JOB_FOLDER"]) / f"{torch.distributed.get_rank()}.json"
    file.write_text(json.dumps(result), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
