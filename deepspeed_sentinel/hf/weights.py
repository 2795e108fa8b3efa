"""Weights of one stage: drawn piece by piece, or read from safetensors files; no rank holds the whole model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig, _get_resolved_checkpoint_files

from deepspeed_sentinel.hf.plan import Plan, initialise


class Source(Protocol):
    """Where a stage's weights come from."""

    def fill(self, model: PreTrainedModel, plan: Plan, local: range) -> None:
        """Give the pieces ``local`` of ``model``, whose other pieces are left out, storage and values."""


class Given:
    """The weights that the model came with."""

    def fill(self, model: PreTrainedModel, plan: Plan, local: range) -> None:
        pass


class Drawn:
    """Random weights as transformers draws them, each piece from a seed of its own.

    So the weights are the same for any number of stages and replicas (they are not those that ``from_config`` draws
    in one sequence).
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fill(self, model: PreTrainedModel, plan: Plan, local: range) -> None:
        initialise(model, model, seeds={name: self._seed + index for index, name in enumerate(plan.pieces)})


class Pretrained:
    """A folder or hub name with safetensors weights, of which a stage reads only its own.

    Raises:
        ValueError: no safetensors weights there, or a parameter of this stage is missing in them.
    """

    def __init__(self, name_or_path: str, options: dict[str, Any]) -> None:
        self._name = name_or_path
        self._options = options

    def fill(self, model: PreTrainedModel, plan: Plan, local: range) -> None:
        files, index = _get_resolved_checkpoint_files(
            pretrained_model_name_or_path=self._name,
            variant=None,
            gguf_file=None,
            use_safetensors=True,
            user_agent=None,
            is_remote_code=False,
            download_kwargs=self._options,
        )
        settings = LoadStateDictConfig(
            pretrained_model_name_or_path=self._name,
            sharded_metadata=index,
            device_map={"": "cpu"},
            dtype=model.dtype,
            weight_mapping=get_model_conversion_mapping(model),
            use_safetensors=True,
        )
        found, _ = model._load_pretrained_model(model, None, files, settings)
        tied = {plan.tied[0]} if plan.tied else set()
        missing = sorted(name for name in found.missing_keys - tied if name in dict(model.named_parameters()))
        if missing or found.mismatched_keys:
            wrong = missing or [str(key) for key in found.mismatched_keys]
            raise ValueError(
                f"{self._name} does not fit {type(model).__name__}: {', '.join(wrong)} is missing or has another "
                "shape. Pass a checkpoint that was saved with save_pretrained()."
            )
        initialise(model, model)  # what is in no checkpoint: rotary frequencies and the like


def resolve(
    model: PreTrainedModel | PreTrainedConfig | str | os.PathLike[str], seed: int, options: dict[str, Any]
) -> tuple[PreTrainedModel, Source]:
    """The model, on the meta device unless it came with weights, and the source of its weights."""
    if isinstance(model, PreTrainedModel):
        if options:
            raise ValueError(f"options {sorted(options)} are for loading by name, but a model was given.")
        if any(parameter.is_meta for parameter in model.parameters()):
            return model, Drawn(seed)
        return model, Given()
    if isinstance(model, PreTrainedConfig):
        return _on_meta(model, **options), Drawn(seed)
    if isinstance(model, (str, os.PathLike)):
        dtype = options.pop("dtype", "auto")
        config = AutoConfig.from_pretrained(model, **options)
        name = str(Path(model)) if os.path.isdir(model) else str(model)
        attention = (
            {} if "attn_implementation" not in options else {"attn_implementation": options["attn_implementation"]}
        )
        options = {key: value for key, value in options.items() if key != "attn_implementation"}
        precision = {} if dtype == "auto" else {"dtype": dtype}
        return _on_meta(config, **attention, **precision), Pretrained(name, options)
    raise ValueError(
        f"model must be a transformers model, a config, or the name or folder of a pretrained model, got "
        f"{type(model).__name__}."
    )


def _on_meta(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(config).__name__} is an encoder-decoder model and cannot be split into pipeline stages: use a "
            "decoder-only causal LM such as LlamaForCausalLM."
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)
