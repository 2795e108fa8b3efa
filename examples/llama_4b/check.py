"""Batch and memory arithmetic of the configs beside this file, from the model itself, built on the meta device.

    python examples/llama_4b/check.py [REPLICAS] [TOKENS]

What counts: bf16 weights (2 bytes a parameter), fp32 gradients (4), fp32 weights and Adam's two moments (12, shared
out over the replicas by ZeRO-1); one hidden state a layer and micro-batch in flight (layers are recomputed), the
working set of one layer, and the logits in bf16, fp32 and their gradient on the last stage. What does not: the
allocator's overhead and communication buffers; leave a tenth of the memory free for them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from deepspeed.runtime.utils import partition_balanced
from transformers import AutoConfig, AutoModelForCausalLM

from deepspeed_sentinel.hf.plan import Plan

HERE = Path(__file__).parent
GIB = 2**30
LAYER_ACTIVATIONS = 34  # bytes a token and hidden unit that one layer keeps for its backward pass, arXiv 2205.05198


def check(file: Path, replicas: int, tokens: int) -> list[float]:
    """Print the arithmetic of one config; returns GiB of each stage."""
    deepspeed = json.loads(file.read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(HERE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plan = Plan.of(model)
    sizes = [sum(p.numel() for p in model.get_submodule(piece).parameters()) for piece in plan.pieces]
    stages, micro_batches = deepspeed["pipeline"]["stages"], deepspeed["gradient_accumulation_steps"]
    rows = deepspeed["train_micro_batch_size_per_gpu"]
    parts = [int(part) for part in partition_balanced(sizes, stages)]
    message = rows * tokens * config.hidden_size * 2
    print(f"\n{file.name}: {sum(sizes) / 1e9:.2f} B parameters, {stages} stages x {replicas} replicas")
    print(
        f"  a step: {rows} x {micro_batches} x {replicas} = {rows * micro_batches * replicas} rows of {tokens} tokens, "
        f"{rows * micro_batches * replicas * tokens / 1e6:.2f} M tokens; "
        f"{100 * (stages - 1) / (stages - 1 + micro_batches):.0f} % of the time is pipeline bubble"
    )
    print(f"  a message between stages: {message / 2**20:.0f} MiB")
    needed = []
    for stage in range(stages):
        held = range(parts[stage], parts[stage + 1])
        parameters = sum(sizes[index] for index in held)
        layers = len(set(held) & set(plan.layers))
        states = parameters * (2 + 4 + 12 / replicas)
        in_flight = min(micro_batches, stages - stage)
        activations = message * layers * in_flight + rows * tokens * config.hidden_size * LAYER_ACTIVATIONS
        logits = rows * tokens * config.vocab_size * (2 + 4 + 4) if stage == stages - 1 else 0
        needed.append((states + activations + logits) / GIB)
        print(
            f"  stage {stage:2d}: {parameters / 1e6:5.0f} M parameters, {layers} layers, "
            f"{states / GIB:4.1f} GiB states, {(activations + logits) / GIB:4.1f} GiB activations"
        )
    print(f"  largest stage: {max(needed):.1f} GiB")
    return needed


def main() -> None:
    replicas = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 4096
    for file in sorted(HERE.glob("deepspeed_*_stages.json")):
        check(file, replicas, tokens)


if __name__ == "__main__":
    main()
