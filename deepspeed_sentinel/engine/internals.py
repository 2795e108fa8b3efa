"""What of DeepSpeed is touched here, though it promises most of that to nobody, and whether it is there.

A version of DeepSpeed that is newer than what was tested may have moved any of it. So there is no upper bound, but a
look at every name: at the modules before they are imported, at an engine before it is watched.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator

import deepspeed

from deepspeed_sentinel import flag

OLDEST, NEWEST = "0.16.0", "0.19.8"  # that the tests have been run with, see docs/versions.md

# Names with spaces between them, by where they must be.
_INSTRUCTIONS = "SendActivation RecvActivation SendGrad RecvGrad ReduceTiedGrads ReduceGrads OptimizerStep"
_MODULES = {
    "deepspeed.accelerator": "get_accelerator",
    "deepspeed.runtime.activation_checkpointing.checkpointing": "get_cuda_rng_tracker",
    "deepspeed.runtime.fp16.fused_optimizer": "FP16_Optimizer",
    "deepspeed.runtime.fp16.unfused_optimizer": "FP16_UnfusedOptimizer",
    "deepspeed.runtime.pipe.engine": "PipelineEngine",
    "deepspeed.runtime.pipe.p2p": "_grid",
    "deepspeed.runtime.pipe.schedule": f"PipeSchedule TrainSchedule {_INSTRUCTIONS}",
    "deepspeed.runtime.utils": "clip_grad_norm_",
    "deepspeed.utils": "logger",
}
_ENGINE = """
    _INSTRUCTION_MAP _aggregate_total_loss _bcast_pipe_scalar _exec_schedule _global_grad_norm _next_batch
    _reduce_outputs _step_applied basic_optimizer clip_fp32_gradients communication_data_type data_iterator destroy
    device dp_group_loss dynamic_loss_scale dynamic_shape eval_batch first_output_send fp16_enabled global_samples
    global_steps grad_layer gradient_accumulation_steps gradient_clipping grid has_moe_layers is_last_stage
    load_checkpoint micro_batch_size micro_batches module monitor mpu num_stages optimizer pipe_buffers pipe_recv_buf
    reset_activation_shape save_checkpoint set_train_batch_size skipped_steps stage_id total_additional_losses
    total_loss train_batch train_batch_size using_bf16_optimizer zero_grad zero_optimization
"""
_BELOW = {
    "grid": "data_parallel_size get_data_parallel_id get_pipe_parallel_group get_stage_id pipe_parallel_size "
    "stage_to_global topology",
    "module": "get_tied_weights_and_groups loss_fn parameters",
    "mpu": "get_data_parallel_group get_pipe_parallel_group",
}
_SCALED = "_update_scale loss_scale zero_grad"
# By the name of a class. Another one has its gradients where torch has them.
_OPTIMIZERS = {
    "BF16_Optimizer": "clear_hp_grads clear_lp_grads get_grads_for_reduction",
    "DeepSpeedZeroOptimizer": f"averaged_gradients first_offset params_in_partition use_grad_accum_attribute {_SCALED}",
    "FP16_Optimizer": _SCALED,
    "FP16_UnfusedOptimizer": _SCALED,
}


def check_modules() -> None:
    """Raise ImportError that says what of DeepSpeed's modules is missing, if anything is."""
    missing = list(_missing_of_modules())
    if missing:
        raise ImportError(_moved(missing))


def check_engine(engine: object) -> None:
    """Raise ValueError that says what a PipelineEngine lacks; if nothing, warn of a DeepSpeed that is not tested."""
    missing = list(_missing_of_engine(engine))
    if missing:
        raise ValueError(_moved(missing))
    if release(deepspeed.__version__) > release(NEWEST):
        flag.say(
            f"DeepSpeed {deepspeed.__version__} is newer than what this was tested with, {OLDEST} to {NEWEST}: it has "
            "every name that is touched, and whether it does with them what it did is not known"
        )


def _missing_of_modules() -> Iterator[str]:
    for path, names in _MODULES.items():
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError:
            yield path
        else:
            yield from _lacks(module, names, path)


def _missing_of_engine(engine: object) -> Iterator[str]:
    here = "PipelineEngine"
    yield from _lacks(engine, _ENGINE, here)
    for part, names in _BELOW.items():
        if hasattr(engine, part):
            yield from _lacks(getattr(engine, part), names, f"{here}.{part}")
    known = {instruction.__name__ for instruction in getattr(engine, "_INSTRUCTION_MAP", ())}
    yield from (f"{here}._INSTRUCTION_MAP[{name}]" for name in _INSTRUCTIONS.split() if name not in known)
    optimizer = getattr(engine, "optimizer", None)
    for kind in type(optimizer).__mro__:
        yield from _lacks(optimizer, _OPTIMIZERS.get(kind.__name__, ""), kind.__name__)


def _lacks(owner: object, names: str, called: str) -> Iterator[str]:
    return (f"{called}.{name}" for name in names.split() if not hasattr(owner, name))


def _moved(missing: list[str]) -> str:
    return (
        f"sentinel needs of DeepSpeed what version {deepspeed.__version__} does not have: {', '.join(missing)}. Any "
        f"that has it is allowed; tested are {OLDEST} to {NEWEST}. Install one of these, or a newer "
        'deepspeed-sentinel, or set "sentinel": {"enabled": false}.'
    )


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: of "0.19.9+abc1" (0, 19, 9)."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
