"""What the probe costs: forward and backward of one pipeline stage, with and without it, in one run.

    python benchmarks/step_cost.py --shape 4B

Needs torch, triton, numpy and transformers; deepspeed is not needed and the package need not be installed. A stage in
the middle of a pipeline meets four messages a micro-batch: the activation it receives and the one it sends, the
gradient it receives and the one it sends. Watched and unwatched steps alternate, so that whatever else the machine
does hits both alike. On a machine without a GPU it runs a small shape and says so.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import support
import torch

support.find_package()

from deepspeed_sentinel.evidence.buffers import PUBLIC  # noqa: E402
from deepspeed_sentinel.evidence.probe import Probe  # noqa: E402
from deepspeed_sentinel.evidence.table import RECEIVED, SENT  # noqa: E402
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@dataclass(frozen=True)
class Shape:
    """Of a Llama and its pipeline; a stage is built with layers // stages layers, at least one."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    stages: int

    @property
    def layers_a_stage(self) -> int:
        return max(1, self.layers // self.stages)


SHAPES = {
    "small": Shape(256, 688, 4, 4, 8, 4),
    "0.6B": Shape(1024, 3072, 16, 8, 28, 14),
    "1.2B": Shape(2048, 8192, 32, 8, 16, 16),
    "4B": Shape(3072, 8192, 24, 8, 36, 16),
    "8B": Shape(4096, 14336, 32, 8, 32, 16),
    "70B": Shape(8192, 28672, 64, 8, 80, 16),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["4B"] if CUDA else ["small"])
    parser.add_argument("--tokens", type=int, default=4096 if CUDA else 512, help="a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument(
        "--jobs", type=int, choices=(1, 2, 3, 4), default=3, help="sketches of a message: public, then secret"
    )
    parser.add_argument("--rounds", type=int, default=30 if CUDA else 10, help="pairs of steps")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    return options


class Stage(torch.nn.Module):
    """Decoder layers of one stage, as the middle of a pipeline has them."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        super().__init__()
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            num_hidden_layers=shape.layers,
            max_position_embeddings=tokens,
            attn_implementation="sdpa",
        )
        self.layers = torch.nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(shape.layers_a_stage))
        self.rotary = LlamaRotaryEmbedding(config)
        self.register_buffer("positions", torch.arange(tokens)[None])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        embedded = self.rotary(hidden, self.positions)
        for layer in self.layers:
            out = layer(hidden, position_embeddings=embedded, position_ids=self.positions)
            hidden = out if isinstance(out, torch.Tensor) else out[0]
        return hidden


def step(
    stage: Stage, inputs: list[torch.Tensor], gradient: torch.Tensor, probe: Probe | None, seeds: torch.Tensor
) -> None:
    """All micro-batches of a step; a probe reads the four messages of each and sums up at the end."""
    if probe:
        probe.begin_step(len(inputs), dict.fromkeys(probe.ends, seeds))
    for x in inputs:
        x.grad = None
        if probe:
            observe(probe, (FORWARD, RECEIVED), x)
        y = stage(x)
        if probe:
            observe(probe, (FORWARD, SENT), y)
            observe(probe, (BACKWARD, RECEIVED), gradient)
        y.backward(gradient)
        if probe:
            assert x.grad is not None
            observe(probe, (BACKWARD, SENT), x.grad)
    if probe:
        for end in probe.ends:
            probe.end_statistics(end, 1.0)


def observe(probe: Probe, end: tuple[int, int], message: torch.Tensor) -> None:
    probe.observe(end, probe.next_micro_batch(end), (message.detach(),))


def seconds(work: Any) -> float:
    if CUDA:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    shape, dtype = SHAPES[name], torch.bfloat16 if CUDA else torch.float32
    torch.manual_seed(0)
    with torch.device(DEVICE):
        stage = Stage(shape, options.tokens).to(dtype)
    inputs = [
        torch.randn(1, options.tokens, shape.hidden, device=DEVICE, dtype=dtype).requires_grad_()
        for _ in range(options.micro_batches)
    ]
    gradient = torch.randn_like(inputs[0]) * 1e-3
    probe = Probe(Mesh(3, 1), 1, DEVICE, seed=0)
    seeds = torch.tensor([[1, 2], [3, 4], [3, 5], [3, 6]], device=DEVICE)[: options.jobs]
    timed: dict[bool, list[float]] = {False: [], True: []}
    for index in range(options.rounds + 3):
        for watched in (False, True) if index % 2 else (True, False):
            taken = seconds(lambda watched=watched: step(stage, inputs, gradient, probe if watched else None, seeds))
            if index >= 3:  # the first ones compile and warm up
                timed[watched].append(taken)
    assert all(math.isfinite(value) for value in probe.end_statistics(probe.ends[0], 1.0).scalars_M3.flatten().tolist())
    ratios = sorted(watched / plain for plain, watched in zip(timed[False], timed[True], strict=True))
    return {
        "shape": name,
        **asdict(shape),
        "layers_built": shape.layers_a_stage,
        "tokens": options.tokens,
        "micro_batches": options.micro_batches,
        "jobs": options.jobs,
        "public_job": PUBLIC,
        "dtype": str(dtype).removeprefix("torch."),
        "plain": support.quantiles(timed[False]),
        "watched": support.quantiles(timed[True]),
        "cost": statistics.median(timed[True]) / statistics.median(timed[False]) - 1,
        "cost_of_pairs": {
            "median": statistics.median(ratios) - 1,
            "p10": ratios[len(ratios) // 10] - 1,
            "p90": ratios[-1 - len(ratios) // 10] - 1,
        },
    }


def main() -> None:
    options = parse()
    place = "gpu" if CUDA else "cpu"
    if not CUDA:
        print("No GPU: this is the CPU path (the torch references) at a small shape.")
    document = {
        "what": "microseconds of one stage's forward and backward over all micro-batches, with the probe over without",
        "path": place,
        **support.machine(),
        "results": [],
    }
    for name in options.shape:
        row = measure(name, options)
        document["results"].append(row)
        pairs = row["cost_of_pairs"]
        print(
            f"{name}: hidden {row['hidden']}, {row['layers_built']} layers, {row['tokens']} tokens: "
            f"{row['plain']['median_us'] / 1e3:.2f} ms without, {row['watched']['median_us'] / 1e3:.2f} ms with the "
            f"probe: {row['cost']:+.2%} (pairs: {pairs['median']:+.2%}, {pairs['p10']:+.2%} to {pairs['p90']:+.2%})"
        )
        if CUDA:
            torch.cuda.empty_cache()
    support.write(options.out or support.ROOT / "benchmarks" / "results" / f"step_cost_{place}.json", document)


if __name__ == "__main__":
    main()
