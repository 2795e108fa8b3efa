"""Sentinel's state in DeepSpeed checkpoints: it travels in the client state of every stage's own file."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import logger

if TYPE_CHECKING:
    from deepspeed_sentinel.engine.sentinel import Sentinel

KEY = "deepspeed_sentinel"


def saver(original: Callable[..., Any], sentinel: Sentinel) -> Callable[..., Any]:
    """``engine.save_checkpoint`` that adds Sentinel's state."""

    @functools.wraps(original)
    def save_checkpoint(save_dir: str, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any) -> Any:
        return original(save_dir, tag, {**(client_state or {}), KEY: sentinel.state_dict()}, *args, **kwargs)

    return save_checkpoint


def loader(original: Callable[..., Any], sentinel: Sentinel) -> Callable[..., Any]:
    """``engine.load_checkpoint`` that takes Sentinel's state back out."""

    @functools.wraps(original)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, client_state = original(*args, **kwargs)
        if path is None:
            return path, client_state
        state = client_state.pop(KEY, None)
        weights_only = inspect.signature(original).bind(*args, **kwargs).arguments.get("load_module_only", False)
        problem = "was loaded for its weights only" if weights_only else _problem(state, sentinel)
        if problem:
            sentinel.reset()
            if dist.get_rank() == 0:
                logger.warning(
                    f"[sentinel] checkpoint {path} {problem}: baselines, fences and convictions start anew, with "
                    f"{sentinel.config.warmup_steps} steps of warm-up"
                )
        else:
            sentinel.load_state_dict(state)
        return path, client_state

    return load_checkpoint


def _problem(state: Any, sentinel: Sentinel) -> str | None:
    if state is None:
        return "has no Sentinel state"
    here = sentinel.state_shape()
    differing = [
        f"{name} {state['shape'].get(name)} (here {here[name]})"
        for name in here
        if state["shape"].get(name) != here[name]
    ]
    return f"is of a run with {', '.join(differing)}" if differing else None


def to_tensors(state: Any) -> Any:
    """A nested dict of numpy arrays as tensors, so that ``torch.load`` needs no other class."""
    if isinstance(state, dict):
        return {key: to_tensors(value) for key, value in state.items()}
    return torch.from_numpy(np.ascontiguousarray(state)).reshape(np.shape(state))


def to_arrays(state: Any) -> Any:
    """The inverse of ``to_tensors``."""
    if isinstance(state, dict):
        return {key: to_arrays(value) for key, value in state.items()}
    return state.cpu().numpy()
