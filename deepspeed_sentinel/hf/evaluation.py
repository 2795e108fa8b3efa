"""What evaluation needs of all stages and replicas: logits where the Trainer looks for them, and no sample twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator

from deepspeed_sentinel.hf.batches import Batch
from deepspeed_sentinel.hf.pipeline import CausalLMPipeline


def evaluate_batch(engine: Any, batch: Batch) -> tuple[torch.Tensor | None, Any]:
    """Loss and outputs of this replica's batch on its last stage; elsewhere None and None."""
    losses, outputs = engine.eval_batch(
        iter([batch]), return_logits=True, reduce_output=None, bcast_loss=False, num_micro_batches=1
    )
    return (losses[0], outputs) if engine.is_last_stage() else (None, None)


def share_logits(engine: Any, pipeline: CausalLMPipeline, outputs: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """The last stage's logits on all stages of the replica, float32 [B, T, V]."""
    if pipeline.is_last:
        logits_BTV = (outputs[0] if isinstance(outputs, tuple) else outputs).detach().float().contiguous()
    else:
        size = pipeline.config.get_text_config().vocab_size
        logits_BTV = torch.empty((*ids_BT.shape, size), device=engine.device)
    source = engine.grid.stage_to_global(engine.num_stages - 1)
    dist.broadcast(logits_BTV, source, group=engine.mpu.get_pipe_parallel_group())
    return logits_BTV


def gather_replicas(accelerator: Accelerator, tensor: torch.Tensor, stages: int, out_C: np.ndarray) -> torch.Tensor:
    """``gather_for_metrics`` over replicas: all stages hold the same, so the first stage's is kept.

    Args:
        accelerator: of this process.
        tensor: [B, ...], this process's rows.
        stages: how many.
        out_C: bool [C], columns whose rows do not count. First and last stage never move, so they are a replica's.
    """
    gathered = accelerator.gather(tensor)
    gathered = gathered[: len(gathered) // stages]
    counts = np.repeat(~out_C, len(gathered) // len(out_C))
    state = accelerator.gradient_state
    if state.end_of_dataloader and state.remainder > 0:
        counts[state.remainder :] = False
    return gathered if counts.all() else gathered[torch.from_numpy(counts).to(gathered.device)]
