"""Which tensors of a pipeline engine all replicas of a stage hold alike.

    parameters                  always, frozen ones too: broadcast at the start, stepped from reduced gradients
    what the optimizer steps    without a wrapper (the parameters themselves), FP16_Optimizer, FP16_UnfusedOptimizer
    (fp32 masters), its state   (fp32 copies): each replica steps all of it
    masters and state           ZeRO, and BF16_Optimizer also without ZeRO: in partitions, each on one replica alone, so
                                there is nothing to compare with. What is damaged there reaches all replicas alike
    buffers                     never: BatchNorm's follow the replica's own data
    numbers that are no tensor  never: loss scale, learning rate, step counts of some optimizers

An optimizer that is not known may keep anything, so of it the parameters alone are compared. One that communicates by
itself (1-bit Adam, 0/1 Adam, 1-bit LAMB) lets replicas drift apart between its own exchanges: nothing is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine

_COMMUNICATES = "deepspeed.runtime.fp16.onebit"


def replicated(engine: PipelineEngine) -> list[torch.Tensor]:
    """The tensors themselves, without a graph and each once, in an order that is the same on all replicas."""
    basic = engine.basic_optimizer
    if type(basic).__module__.startswith(_COMMUNICATES):
        return []
    tensors = {id(parameter): parameter.detach() for parameter in engine.module.parameters()}
    if engine.optimizer is basic or isinstance(engine.optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
        tensors.update((id(tensor), tensor.detach()) for tensor in _of_optimizer(basic))
    return list(tensors.values())


def _of_optimizer(basic: Any) -> Iterator[torch.Tensor]:
    for group in basic.param_groups:
        for parameter in group["params"]:
            yield parameter
            state = basic.state.get(parameter, {})  # indexing would make one
            yield from (state[name] for name in sorted(state) if isinstance(state[name], torch.Tensor))
