"""What ``SentinelTrainer`` reads from the DeepSpeed config, and which training arguments it cannot honour."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from deepspeed_sentinel.hf.compat import SCHEDULERS_OF_METRICS

_PIPELINE = ("stages", "partition", "activation_checkpoint_interval")
_OPTIMIZERS_IN_BACKWARD = (OptimizerNames.LOMO, OptimizerNames.ADALOMO)
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")


@dataclass(frozen=True)
class Mesh:
    """Processes as stages times replicas."""

    stages: int
    replicas: int


def given_config(args: TrainingArguments) -> dict[str, Any]:
    """The DeepSpeed config as it was given, before transformers filled in ``"auto"``.

    Raises:
        ValueError: there is none, or none with ``"pipeline": {"stages": N}``.
    """
    config = args.deepspeed
    if isinstance(config, (str, Path)):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    if not isinstance(config, Mapping):
        raise ValueError(
            'SentinelTrainer needs a DeepSpeed config: pass TrainingArguments(deepspeed={"pipeline": {"stages": 4}, '
            '"sentinel": {"enabled": true}}), or the path of such a JSON file.'
        )
    pipeline = config.get("pipeline")
    stages = pipeline.get("stages") if isinstance(pipeline, Mapping) else None
    if not isinstance(pipeline, Mapping) or not isinstance(stages, int) or isinstance(stages, bool):
        raise ValueError(
            f'the DeepSpeed config must say how many stages: got "pipeline": {pipeline!r}, expected '
            '"pipeline": {"stages": 4} with a whole number. Without a pipeline use transformers\' own Trainer.'
        )
    unknown = [key for key in pipeline if key not in _PIPELINE]
    if unknown:
        raise ValueError(
            f'"pipeline" has {", ".join(map(repr, unknown))}, which would have no effect here; allowed are '
            f"{', '.join(_PIPELINE)}."
        )
    return copy.deepcopy(dict(config))


def check_config(config: Mapping[str, Any], args: TrainingArguments) -> Mesh:
    """Check the config against the processes and the arguments; returns the mesh.

    Raises:
        ValueError: names the key, the value and what is allowed.
    """
    stages, world = config["pipeline"]["stages"], args.world_size
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != world:
        raise ValueError(
            f"{started} processes were started, but TrainingArguments counts {world}. Without a GPU pass use_cpu=True."
        )
    if stages < 1 or world % stages:
        fitting = [n for n in range(1, world + 1) if world % n == 0]
        raise ValueError(
            f'"pipeline": {{"stages": {stages}}} does not divide {world} processes; allowed are {fitting}. Change it, '
            "or the number of processes."
        )
    mesh = Mesh(stages, world // stages)
    zero = config.get("zero_optimization", {}).get("stage", 0)
    if zero not in (0, 1):
        raise ValueError(
            f'"zero_optimization": {{"stage": {zero}}} cannot be used with a pipeline; allowed are 0 and 1. Stages '
            "already hold a part of the model each."
        )
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * mesh.replicas
    if config.get("train_batch_size", "auto") not in ("auto", samples):
        raise ValueError(
            f'"train_batch_size" is {config["train_batch_size"]}, but {args.per_device_train_batch_size} samples a '
            f"micro-batch x {args.gradient_accumulation_steps} micro-batches x {mesh.replicas} replicas are {samples}. "
            'Stages do not multiply it. Leave it out or set it to "auto".'
        )
    monitors = [name for name in _MONITORS if config.get(name, {}).get("enabled")]
    if monitors:
        raise ValueError(
            f"DeepSpeed's {', '.join(monitors)} cannot be used here: use TrainingArguments(report_to=...)."
        )
    return mesh


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what would have no effect or a wrong one.

    Raises:
        ValueError: one line for each argument, with its value and what to do.
    """
    accelerator = args.accelerator_config
    refused = {
        "fsdp": (args.fsdp, "stages and ZeRO-1 already divide model and optimizer"),
        "neftune_noise_alpha": (args.neftune_noise_alpha, "add the noise in the model"),
        "auto_find_batch_size": (args.auto_find_batch_size, "set per_device_train_batch_size"),
        "torch_compile": (args.torch_compile, "leave it out"),
        "use_liger_kernel": (args.use_liger_kernel, "leave it out"),
        "fp16_full_eval": (args.fp16_full_eval, "set fp16 for training and evaluation"),
        "bf16_full_eval": (args.bf16_full_eval, "set bf16 for training and evaluation"),
        "push_to_hub": (args.push_to_hub, "upload the folder that save_model() writes"),
        "optim": (
            args.optim.value if args.optim in _OPTIMIZERS_IN_BACKWARD else None,
            "it steps within the backward pass",
        ),
        "lr_scheduler_type": (
            args.lr_scheduler_type.value if args.lr_scheduler_type.value in SCHEDULERS_OF_METRICS else None,
            "the engine steps its scheduler without the metric; change the rate in a callback",
        ),
        "include_for_metrics": (args.include_for_metrics, "leave it out"),
        "batch_eval_metrics": (args.batch_eval_metrics, "leave it out"),
        "train_sampling_strategy": (
            args.train_sampling_strategy if args.train_sampling_strategy == "batch_rebalance" else None,
            'use "random", "sequential" or "group_by_length"',
        ),
        "accelerator_config.split_batches": (accelerator.split_batches, "set per_device_train_batch_size"),
        "accelerator_config.dispatch_batches": (accelerator.dispatch_batches, "each replica reads its own data"),
        "accelerator_config.even_batches": (
            None if accelerator.even_batches else "False",
            "replicas need equally many batches; use dataloader_drop_last",
        ),
        "accelerator_config.use_seedable_sampler": (
            None if accelerator.use_seedable_sampler else "False",
            "stages must draw the same order",
        ),
    }
    problems = [f"  {name}={value!r}: {advice}" for name, (value, advice) in refused.items() if value]
    if problems:
        raise ValueError("SentinelTrainer does not support these training arguments:\n" + "\n".join(problems))


def engine_config(
    filled: Mapping[str, Any], args: TrainingArguments, mesh: Mesh, trains: bool = True
) -> dict[str, Any]:
    """The config for the engine: what transformers filled in, with replicas in place of processes.

    Without training there is no optimizer, and so nothing that ZeRO could divide.
    """
    config = copy.deepcopy(dict(filled))
    if not trains:
        for key in ("optimizer", "scheduler", "zero_optimization"):
            config.pop(key, None)
    config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    config["train_batch_size"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * mesh.replicas
    config.setdefault("gradient_clipping", args.max_grad_norm)
    if not config["gradient_clipping"] and not config.get("zero_optimization", {}).get("stage"):
        # the engine takes the norm, which the Trainer logs in any case, only where it clips
        config["gradient_clipping"] = float("inf")
    config.setdefault("steps_per_print", 10**9)  # the Trainer logs
    return config
