"""A ``save_pretrained`` folder written stage by stage: nobody gathers the model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from deepspeed_sentinel.hf.adapters import save_adapters
from deepspeed_sentinel.hf.pipeline import CausalLMPipeline


def save_pretrained(pipeline: CausalLMPipeline, folder: str | os.PathLike[str]) -> None:
    """Write config and weights so that ``AutoModelForCausalLM.from_pretrained`` loads them.

    With adapters write these alone, so that ``PeftModel.from_pretrained`` loads them.

    Each stage's first replica writes one safetensors file of its own weights, in the names and layout of published
    checkpoints. To be called on every rank; returns when all is written. The folder must be one for all ranks.
    """
    model, stages = pipeline.stage_model, pipeline.num_stages
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if pipeline.peft_model is not None:
        save_adapters(pipeline, path)
        return
    first = dist.get_rank() == 0
    if first:
        stale = [
            *path.glob("model-?????-of-?????.safetensors"),
            path / SAFE_WEIGHTS_NAME,
            path / SAFE_WEIGHTS_INDEX_NAME,
        ]
        for file in stale:
            file.unlink(missing_ok=True)
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(path)
        if model.can_generate():
            model.generation_config.save_pretrained(path)
    dist.barrier()
    sizes: dict[str, tuple[str, int]] = {}
    if pipeline.mpu().get_data_parallel_id() == 0:
        suffix = f"-{pipeline.stage_id + 1:05d}-of-{stages:05d}" if stages > 1 else ""
        name = SAFE_WEIGHTS_NAME.replace(".safetensors", f"{suffix}.safetensors")
        weights = {key: tensor.detach() for key, tensor in model.state_dict().items()}
        if pipeline.plan.tied:
            head, embedding = pipeline.plan.tied
            weights.pop(head, None)
            if not pipeline.is_first:
                weights.pop(embedding, None)
        weights = {key: tensor.contiguous() for key, tensor in revert_weight_conversion(model, weights).items()}
        save_file(weights, path / name, metadata={"format": "pt"})
        sizes = {key: (name, tensor.numel() * tensor.element_size()) for key, tensor in weights.items()}
    everyone: list[dict[str, tuple[str, int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, sizes)
    if first and stages > 1:
        merged = {key: value for part in everyone for key, value in part.items()}
        index = {
            "metadata": {"total_size": sum(size for _, size in merged.values())},
            "weight_map": {key: name for key, (name, _) in sorted(merged.items())},
        }
        (path / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    dist.barrier()
