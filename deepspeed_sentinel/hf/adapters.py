"""PEFT models: LoRA adapters in a pipeline. Needs the extra ``peft``, and only where such a model is given."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel

    from deepspeed_sentinel.hf.pipeline import CausalLMPipeline

_WEIGHTS = "adapter_model.safetensors"
_PARTS = ".stages"


def taken_apart(model: Any) -> tuple[Any, PeftModel | None]:
    """The transformers model with adapters in it, and the PeftModel around it; anything else as it is, and None.

    The PeftModel's own forward is left out: for LoRA it hands on what it is given.

    Raises:
        ValueError: adapters that do more than replace modules, or that are not in a PeftModel.
    """
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        for name, config in model.peft_config.items():
            if config.peft_type != peft.PeftType.LORA or config.alora_invocation_tokens is not None:
                kind = "aLoRA" if config.peft_type == peft.PeftType.LORA else config.peft_type.value
                raise ValueError(
                    f"adapter {name!r} is of kind {kind}; only LoRA can be split into pipeline stages (DoRA and rsLoRA "
                    "with it): other kinds change what the whole model is given. Use LoraConfig."
                )
        whole: PreTrainedModel = model.get_base_model()
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                "the PEFT model is on the meta device, and adapters are drawn when they are made. Load the model with "
                "its weights before get_peft_model()."
            )
        _check_tied(whole)
        return whole, model
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{type(model).__name__} has adapters that were added by add_adapter() or load_adapter(). Use "
            "peft.get_peft_model(), or PeftModel.from_pretrained(model, folder, is_trainable=True)."
        )
    return model, None


def _check_tied(model: PreTrainedModel) -> None:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if dict(model.all_tied_weights_keys) and any(list(end.children()) for end in ends):
        raise ValueError(
            f"{type(model).__name__} ties its embeddings, and an adapter is on one of them: the copies on two stages "
            "would not stay one. Leave embedding and head out of target_modules, modules_to_save and "
            "trainable_token_indices, or load the model with tie_word_embeddings=False."
        )


def save_adapters(pipeline: CausalLMPipeline, folder: Path) -> None:
    """Write what ``PeftModel.save_pretrained`` writes, so that ``PeftModel.from_pretrained`` loads it.

    Each stage's first replica writes its own adapters below the folder, the first process makes one file of them: PEFT
    reads no other. To be called on every rank; the folder must be one for all ranks.
    """
    peft_model: Any = pipeline.peft_model
    first, parts = dist.get_rank() == 0, folder / _PARTS
    if first:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
    dist.barrier()
    if pipeline.mpu().get_data_parallel_id() == 0:
        type(peft_model).save_pretrained(peft_model, str(parts / f"{pipeline.stage_id:05d}"))
    dist.barrier()
    if first:
        stages = sorted(parts.iterdir())
        shutil.copytree(stages[0], folder, dirs_exist_ok=True)
        for file in sorted(stages[0].rglob(_WEIGHTS)):
            name = file.relative_to(stages[0])
            merged = {key: tensor for stage in stages for key, tensor in load_file(stage / name).items()}
            save_file(merged, folder / name, metadata={"format": "pt"})
        shutil.rmtree(parts)
    dist.barrier()
