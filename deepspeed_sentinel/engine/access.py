"""Where DeepSpeed's pipeline engine keeps what we need: plain functions on an engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime import engine as runtime
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import clip_grad_norm_

from deepspeed_sentinel.engine.internals import check_engine, release
from deepspeed_sentinel.mesh import Mesh, Worker

_LARGEST_FP16 = 65504.0


def check_supported(engine: object) -> None:
    """Raise ValueError for engines whose messages or gradients Sentinel cannot watch."""
    if not isinstance(engine, PipelineEngine):
        raise ValueError(
            f"sentinel watches DeepSpeed's PipelineEngine, got {type(engine).__name__}: pass a PipelineModule to "
            'deepspeed.initialize, or set "sentinel": {"enabled": false}.'
        )
    if any(kind.__name__ == "DualPipeVEngine" for kind in type(engine).__mro__):  # not in every version, 0.19.8 has it
        raise ValueError(
            "sentinel does not support DualPipeV yet: its two phases share ranks. Use a PipelineModule, or set "
            '"sentinel": {"enabled": false}.'
        )
    check_engine(engine)
    topology = engine.grid.topology()
    further = {axis: topology.get_dim(axis) for axis in topology.get_axis_names() if axis not in ("pipe", "data")}
    split = ", ".join(f"{axis!r} of size {size}" for axis, size in further.items() if size > 1)
    if split:
        raise ValueError(
            f"sentinel watches a mesh of stages and replicas, and the topology has further axes: {split}. Allowed "
            "beside 'pipe' and 'data' are axes of size 1; tensor-parallel and other shards are not supported yet. Set "
            'those axes to 1, or "sentinel": {"enabled": false}.'
        )
    if engine.has_moe_layers:
        raise ValueError(
            "sentinel does not support deepspeed.moe layers yet: expert parallelism mixes columns, so none could "
            'be excluded. Set "sentinel": {"enabled": false}.'
        )


def mesh_of(engine: PipelineEngine) -> Mesh:
    return Mesh(engine.grid.pipe_parallel_size, engine.grid.data_parallel_size)


def worker_of(engine: PipelineEngine) -> Worker:
    return Worker(engine.grid.get_stage_id(), engine.grid.get_data_parallel_id())


def ranks_of(engine: PipelineEngine) -> np.ndarray:
    """Global rank of each worker, int [S, R]."""
    mesh, topology = mesh_of(engine), engine.grid.topology()
    ranks = np.empty((mesh.stages, mesh.replicas), np.int64)
    for coordinates, rank in topology.mapping.items():
        # Any other axis has the size 1, see ``check_supported``.
        ranks[getattr(coordinates, "pipe", 0), getattr(coordinates, "data", 0)] = rank
    return ranks


def timeouts(engine: PipelineEngine) -> tuple[timedelta, timedelta]:
    """How long torch lets an operation wait: in the default group, and between stages."""
    default, device = dist.distributed_c10d._get_default_group(), torch.device(engine.device)
    groups = (default, engine.grid.get_pipe_parallel_group())
    every, between_stages = (group._get_backend(device).options._timeout for group in groups)
    return every, between_stages


def store() -> dist.Store:
    """By which all ranks found each other."""
    return dist.distributed_c10d._get_default_store()


def stage_module(engine: PipelineEngine) -> torch.nn.Module:
    """All that this stage runs: the root of its modules."""
    return engine.module


def gradients(engine: PipelineEngine) -> Iterator[torch.Tensor]:
    """Every tensor that the reductions of this step read, after backward and before they start."""
    yield from (gradient for _, gradient in gradients_by_parameter(engine))


def gradients_by_parameter(engine: PipelineEngine) -> Iterator[tuple[torch.nn.Parameter | None, torch.Tensor]]:
    """``gradients``, each with its parameter; None where it is of many."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "get_grads_for_reduction"):  # BF16_Optimizer, with or without ZeRO-1: flat buffers
        dense, _ = optimizer.get_grads_for_reduction()
        yield from ((None, flat) for flat in dense)
        return
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            yield parameter, parameter.grad
        accumulated = getattr(parameter, "grad_accum", None)  # ZeRO-1 with its own accumulation dtype
        if accumulated is not None and accumulated is not parameter.grad:
            yield parameter, accumulated


def reduced_gradients(
    engine: PipelineEngine, handed_over: Sequence[tuple[torch.nn.Parameter | None, torch.Tensor]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What was handed over to the reductions of this step and what came out, after they ended: pairs of one shape.

    Args:
        engine: the engine.
        handed_over: ``gradients_by_parameter`` before, copied.
    """
    averaged = getattr(engine.optimizer, "averaged_gradients", None)
    if not averaged:
        yield from zip((copy for _, copy in handed_over), gradients(engine), strict=True)
        return
    # ZeRO-1: of the outcome each replica keeps the share that it steps. ``grad_accum`` comes after ``grad`` and counts.
    optimizer = engine.optimizer
    own = {id(parameter): copy for parameter, copy in handed_over}
    for group, outcomes in averaged.items():
        offset = int(optimizer.first_offset[group])
        for parameter, outcome in zip(optimizer.params_in_partition[group], outcomes or (), strict=False):
            if id(parameter) in own:
                yield own[id(parameter)].reshape(-1)[offset : offset + outcome.numel()], outcome.reshape(-1)
            offset = 0


def gradient_scale(engine: PipelineEngine) -> float:
    """What a gradient message must be multiplied by to be the gradient of its micro-batch's mean loss."""
    return engine.gradient_accumulation_steps() / loss_scale(engine)


def loss_scale(engine: PipelineEngine) -> float:
    return float(engine.optimizer.loss_scale or 1.0) if engine.fp16_enabled() else 1.0


def overflow_limit(engine: PipelineEngine) -> float:
    """Unscaled magnitude above which a gradient overflows fp16 while the loss scale is still sought; or inf."""
    dynamic = engine.fp16_enabled() and engine.dynamic_loss_scale()
    return _LARGEST_FP16 * gradient_scale(engine) if dynamic else float("inf")


def keep_gradient_norm(engine: PipelineEngine) -> None:
    """Make ``engine.get_global_grad_norm()`` answer without mixed precision and ZeRO too, where it clips."""

    def clip_fp32_gradients() -> None:
        engine._global_grad_norm = clip_grad_norm_(
            engine.module.parameters(), engine.gradient_clipping(), mpu=engine.mpu
        )

    engine.clip_fp32_gradients = clip_fp32_gradients


def gradient_divisor(engine: PipelineEngine) -> Callable[[], int]:
    """By what a micro-batch's gradient must be divided in the script so that a step's is the mean over micro-batches.

    DeepSpeed 0.19.8 divides. 0.16.0 to 0.18.2 add up, and 0.18.9 to 0.19.4 divide once a stage (issues 7773, 8152).

    Raises:
        ValueError: of a version that does neither, or that loses gradients with these settings.
    """
    if not hasattr(engine, "_running_engine_backward"):  # DeepSpeed 0.18.3
        if getattr(engine.optimizer, "use_grad_accum_attribute", False):
            raise ValueError(
                f"DeepSpeed {deepspeed.__version__} loses the gradients of all stages but the last where ZeRO-1 "
                'accumulates them in another dtype than the weights have. Set "bf16": {"enabled": true} if the weights '
                "are bfloat16, or load them in float32, or install 0.19.8."
            )
        return lambda: engine.micro_batches
    version = release(deepspeed.__version__)
    if version < (0, 19, 6):
        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} divides gradients by the number of micro-batches once a stage (its "
            "issue 8152), so no pipeline trains as the same model in one piece does. Install 0.19.8, or 0.18.2."
        )
    return lambda: 1


def keep_universal_info(engine: PipelineEngine, info: dict[str, Any]) -> None:
    """Have checkpoints hold what a universal one must know of the module.

    DeepSpeed 0.19.8 asks the module for it, and refuses it of others; 0.16.0 leaves it to who saves.
    """
    if not hasattr(runtime, "UNIVERSAL_CHECKPOINT_INFO"):
        state = {"universal_checkpoint_info": info}
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, client_state=state)


def clear_gradients(engine: PipelineEngine) -> None:
    """Forget what was accumulated in this step, wherever it lies."""
    if hasattr(engine.optimizer, "clear_hp_grads"):
        engine.optimizer.clear_hp_grads()
        engine.optimizer.clear_lp_grads()
    elif engine.zero_optimization() or engine.fp16_enabled():
        engine.optimizer.zero_grad()
        averaged = getattr(engine.optimizer, "averaged_gradients", {})
        averaged.update(dict.fromkeys(averaged))  # where they were reduced already
    else:
        engine.zero_grad()


def skip_step(engine: PipelineEngine, overflow: bool) -> None:
    """Count a step without touching the weights, as DeepSpeed does after an overflow.

    ``overflow``: it is one, so the loss scale comes down.
    """
    if overflow:
        engine.optimizer._update_scale(True)
    clear_gradients(engine)
    engine._step_applied = False
    engine.skipped_steps += 1
    engine.global_steps += 1
    engine.global_samples += engine.train_batch_size()


def floating(tensors: torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]) -> list[torch.Tensor]:
    """The floating-point tensors of a message, in order; these are the ones that have gradients."""
    return [tensor for tensor in as_tuple(tensors) if tensor.is_floating_point()]


def as_tuple(
    tensors: torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
