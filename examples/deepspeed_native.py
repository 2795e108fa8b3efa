"""A transformers model in a plain DeepSpeed loop, guarded by Sentinel: the "sentinel" block of the config does it.

3 stages x 3 replicas, on CPUs or, with one GPU a process, on GPUs. With fewer than three stages nobody but trusted
workers is there, with fewer than three replicas no majority that proves anything:

    torchrun --nproc_per_node 9 examples/deepspeed_native.py [OUTPUT_FOLDER]
"""

from __future__ import annotations

import sys

import deepspeed
import torch
from transformers import LlamaConfig

from deepspeed_sentinel import hf

STAGES, MICRO_BATCHES, ROWS, TOKENS, STEPS = 3, 4, 4, 64, 30
OUTPUT = sys.argv[1] if len(sys.argv) > 1 else "native_out"
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": ROWS,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "gradient_clipping": 1.0,
    "steps_per_print": 1_000_000,
    "sentinel": {"enabled": True, "output_dir": f"{OUTPUT}/sentinel"},
}


def micro_batches(step: int, replica: int) -> list[dict[str, torch.Tensor]]:
    """Counting modulo 64 from a random start in random strides: something that can be learnt."""
    generator = torch.Generator().manual_seed(1000 * step + replica)
    made = []
    for _ in range(MICRO_BATCHES):
        start, stride = torch.randint(64, (2, ROWS, 1), generator=generator)
        ids = (start + (1 + stride % 4) * torch.arange(TOKENS)) % 64
        made.append({"input_ids": ids, "labels": ids})
    return made


def main() -> None:
    deepspeed.init_distributed()
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    pipeline = hf.to_pipeline(config, STAGES)
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=3e-3)
    engine, *_ = deepspeed.initialize(model=pipeline, optimizer=optimizer, config=DEEPSPEED)
    replica = engine.grid.get_data_parallel_id()
    for step in range(STEPS):
        loss = engine.train_batch(hf.step_batches(engine, micro_batches(step, replica)))
        if torch.distributed.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1}: loss {float(loss):.3f}, sentinel {engine.sentinel.counts}", flush=True)
    hf.save_pretrained(pipeline, f"{OUTPUT}/model")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
