"""A script of somebody who never heard of Sentinel: runs anywhere, imports nothing of this repository.

plain.py --deepspeed_config FILE [--stages S] [--steps N]
"""

import argparse

import torch
from deepspeed import add_config_arguments, init_distributed, initialize
from deepspeed.pipe import PipelineModule


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    add_config_arguments(parser)
    arguments = parser.parse_args()
    init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(2 * arguments.stages)]
    model = PipelineModule(layers, num_stages=arguments.stages, loss_fn=torch.nn.functional.mse_loss)
    engine, *_ = initialize(args=arguments, model=model, model_parameters=model.parameters())
    data = iter(lambda: (torch.randn(4, 8), torch.randn(4, 8)), None)
    losses = [float(engine.train_batch(data)) for _ in range(arguments.steps)]
    rank = torch.distributed.get_rank()
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    print(f"rank {rank} trained: finite {finite}, losses {losses}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
