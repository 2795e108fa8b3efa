"""Faults of one worker that no message is tampered with for: hooks of scenarios."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule

STAGE, REPLICA, START, OLD = 1, 2, 4, 3
_past: deque[list[torch.Tensor]] = deque(maxlen=OLD + 1)


def _is_culprit(engine: Any) -> bool:
    return (engine.stage_id, engine.grid.get_data_parallel_id()) == (STAGE, REPLICA)


def stale_weights(engine: Any, step: int) -> None:
    """From START on, compute with the weights of OLD steps ago."""
    if not _is_culprit(engine):
        return
    if step == 0:
        _past.clear()
    _past.append([parameter.detach().clone() for parameter in engine.module.parameters()])
    if step >= START:
        for parameter, old in zip(engine.module.parameters(), _past[0], strict=True):
            parameter.data.copy_(old)


def _turn_gradients(engine: Any) -> None:
    if hasattr(engine.optimizer, "get_grads_for_reduction"):  # BF16_Optimizer: flat buffers beside the parameters
        for gradient in engine.optimizer.get_grads_for_reduction()[0]:
            gradient.neg_()
        return
    for parameter in engine.module.parameters():
        parameter.grad.neg_()


def poisoned_memory(engine: Any, step: int) -> None:
    """From START on, gradients change their sign between what was reported of them and the reduction."""
    if not _is_culprit(engine) or step != START:
        return
    ours = engine._INSTRUCTION_MAP[schedule.ReduceGrads]

    def reduce(self: Any) -> None:
        _turn_gradients(engine)
        ours(self)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.ReduceGrads: reduce}


def poisoned_reduction(engine: Any, step: int) -> None:
    """From START on, another gradient goes into the all-reduce than the one that was shown to the guard."""
    if not _is_culprit(engine) or step != START:
        return
    flat = hasattr(engine.optimizer, "get_grads_for_reduction")
    name = "_bf16_reduce_grads" if flat else "allreduce_gradients"
    honest = getattr(engine, name)

    def reduce(**options: Any) -> None:
        _turn_gradients(engine)
        honest(**options)

    setattr(engine, name, reduce)


def _round_anew(engine: Any) -> None:
    generator = torch.Generator().manual_seed(engine.global_rank)  # layers seed torch's own, alike on all replicas
    for parameter in engine.module.parameters():
        parameter.register_hook(
            lambda gradient: gradient * (1 + 1e-6 * torch.rand(gradient.shape, generator=generator))
        )


def unlike_by_nature(engine: Any, step: int) -> None:
    """Gradients of the middle stage are never the same twice, on any replica, as with some kernels."""
    if engine.stage_id == STAGE and step == 0:
        _round_anew(engine)


def other_hardware(engine: Any, step: int) -> None:
    """One worker computes with more threads than the others of its stage and rounds differently."""
    if _is_culprit(engine) and step == 0:
        torch.set_num_threads(2)
        _round_anew(engine)


def wrong_gradients(engine: Any, step: int) -> None:
    """From START on, gradients of weights are one hundredth too large; messages are right."""
    if _is_culprit(engine) and step == START:
        for parameter in engine.module.parameters():
            parameter.register_hook(lambda gradient: gradient * 1.01)


def transient(engine: Any, step: int) -> None:
    """In step 6 one number of the middle stage's work is wrong the second time that it is computed."""
    if engine.stage_id != STAGE or engine.grid.get_data_parallel_id() != 0 or step != 6:
        return
    calls = 0

    def strike(module: torch.nn.Module, entered: Any, made: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.where(torch.arange(made.shape[-1]) == 3, made * 1.01, made) if calls == 6 else made

    handle = engine.module.forward_funcs[-1].register_forward_hook(strike)
    engine.remove_transient = handle.remove


def dropout(engine: Any, step: int) -> None:
    """All layers drop out, of as many tokens as the data say, from seeds that are each rank's own."""
    if step > 0:
        return
    engine.module.seed_layers = False
    torch.manual_seed(engine.global_rank)
    for layer in engine.module.forward_funcs:
        if isinstance(layer, torch.nn.Module):
            layer.register_forward_hook(_drop_out)


def _drop_out(layer: torch.nn.Module, inputs: Any, outputs: torch.Tensor) -> torch.Tensor:
    tokens = outputs.shape[1] - int(outputs.detach().sum() > 0)
    dropped = torch.nn.functional.dropout(outputs[:, :tokens], 0.1, layer.training)
    return torch.cat([dropped, outputs[:, tokens:]], 1)
