"""Gradients of weights that two stages share, summed over their copies wherever the optimizer accumulates them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine


def reduce_tied_gradients(engine: PipelineEngine) -> None:
    """Sum the gradient of each tied weight over the stages that hold a copy: DeepSpeed's ``ReduceTiedGrads``.

    DeepSpeed 0.19.8 looks for it in ``weight.grad``, or in ``weight._hp_grad`` with its BF16_Optimizer. Where ZeRO-1
    accumulates in another dtype than the weights', it lies in ``weight.grad_accum``, ``weight.grad`` is None, and
    nothing is summed: the copies then drift apart. A copy that is frozen has none of the three and takes no part.
    """
    for weight, group in engine.module.get_tied_weights_and_groups():
        gradient = _gradient(engine, weight)
        if gradient is not None:
            dist.all_reduce(gradient, group=group)


def reduce_rightly(engine: PipelineEngine) -> None:
    """Make an engine without a Sentinel sum tied gradients as above; with one it does so already."""
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.ReduceTiedGrads: reduce_tied_gradients}


def _gradient(engine: PipelineEngine, weight: torch.Tensor) -> torch.Tensor | None:
    if engine.using_bf16_optimizer:
        return getattr(weight, "_hp_grad", None)
    if getattr(engine.optimizer, "use_grad_accum_attribute", False):
        return getattr(weight, "grad_accum", None)
    return weight.grad
