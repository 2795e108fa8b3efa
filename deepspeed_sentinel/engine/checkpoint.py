"""Sentinel's state in DeepSpeed checkpoints: it travels in the client state of every stage's own file.

The judge's state, the wiring, who is convicted and which device is where are the same on all ranks and grow with the
mesh, so only the first stage's file holds them. The ledger of devices is rank 0's alone. Rank 0 is worker (stage 0,
replica 0) in every topology, and replica 0 writes its stage's file, so it gets back what it gave.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.engine.packed import can_be_packed, pack, unpack
from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.mesh import DIRECTIONS
from deepspeed_sentinel.telemetry import console
from deepspeed_sentinel.telemetry.exclusion import read_saved, saved

if TYPE_CHECKING:
    from deepspeed_sentinel.engine.sentinel import Sentinel

KEY = "deepspeed_sentinel"
_OF_FIRST_STAGE = ("judge", "columns", "convicts", "placement")
_MOST_PARTS = 1 << 10
MOST_BYTES = 1 << 33  # of what the first stage alone keeps: 64 x 64 workers have some 2^27 for each part of a message


def saver(original: Callable[..., Any], sentinel: Sentinel) -> Callable[..., Any]:
    """``engine.save_checkpoint`` that adds Sentinel's state."""

    @functools.wraps(original)
    def save_checkpoint(save_dir: str, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any) -> Any:
        sentinel.devices.write()  # first, so that the file is never behind a checkpoint
        state = {**sentinel.state_dict(), **sentinel.devices.state_dict()}
        if sentinel.worker.stage != 0:
            for name in _OF_FIRST_STAGE:
                del state[name]
        return original(save_dir, tag, {**(client_state or {}), KEY: state}, *args, **kwargs)

    return save_checkpoint


def loader(original: Callable[..., Any], sentinel: Sentinel) -> Callable[..., Any]:
    """``engine.load_checkpoint`` that takes Sentinel's state back out."""

    @functools.wraps(original)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, client_state = original(*args, **kwargs)
        if path is None:
            return path, client_state
        sentinel.comparison.after_load()
        state = client_state.pop(KEY, None)
        sentinel.devices.load_state_dict(state)
        weights_only = inspect.signature(original).bind(*args, **kwargs).arguments.get("load_module_only", False)
        # Every stage reads a file of its own, and what one of them cannot use the others must not use either.
        problem, spoilt = ("was loaded for its weights only", ()) if weights_only else _looked_at(state, sentinel)
        words_W = sentinel.gather_words(int(bool(problem)), *_bits(spoilt, sentinel.mesh.links)).amax(0).tolist()
        if words_W[0]:
            sentinel.reset()
            if dist.get_rank() == 0:
                console.say(
                    f"checkpoint {path} {problem or 'cannot be used by another stage'}: baselines, fences "
                    f"and convictions start anew, with {sentinel.config.warmup_steps} steps of warm-up"
                )
            return path, client_state
        without = {divmod(index, sentinel.mesh.links) for index, bit in enumerate(words_W[1:]) if bit}
        mine = pack(_told(state) if sentinel.worker.stage == 0 else None)
        state |= unpack(sentinel.of_first_stage(mine))
        sentinel.load_state_dict(state, without)
        if dist.get_rank() == 0:
            for direction, link in sorted(without):
                console.say(
                    f"checkpoint {path} holds a baseline of the {DIRECTIONS[direction]} messages on link "
                    f"{link} that is not finite: it starts anew, on both ends"
                )
        return path, client_state

    return load_checkpoint


def _told(state: dict[str, Any]) -> dict[str, Any]:
    """What the first stage hands the others."""
    told = {name: state.get(name) for name in _OF_FIRST_STAGE}
    return {**told, "convicts": saved(tuple(read_saved(state.get("convicts")).values()))}


def _bits(links: Collection[tuple[int, int]], count: int) -> list[int]:
    """One whole number for each direction and link: whether it is among them."""
    return [int((direction, link) in links) for direction in range(len(DIRECTIONS)) for link in range(count)]


def _looked_at(state: Any, sentinel: Sentinel) -> tuple[str | None, Collection[tuple[int, int]]]:
    """Why a state cannot be used, and the links of it that cannot."""
    try:
        problem = _problem(state, sentinel)
        return problem, () if problem else sentinel.spoilt_links(state)
    except Exception as error:  # a file may hold anything, and this rank must say so while the others wait for its word
        return f"has a Sentinel state of another kind ({type(error).__name__})", ()


def _problem(state: Any, sentinel: Sentinel) -> str | None:
    if state is None:
        return "has no Sentinel state"
    if not isinstance(state, dict) or not isinstance(state.get("shape"), dict):
        return "has a Sentinel state of another kind"
    here = sentinel.state_shape()
    differing = [
        f"{name} {state['shape'].get(name)} (here {here[name]})"
        for name in here
        if type(state["shape"].get(name)) is not int or state["shape"][name] != here[name]
    ]
    if differing:
        return f"is of a run with {', '.join(differing)}"
    if not _are_baselines(state.get("evidence")):
        return "has no baselines"
    parts = state["shape"].get("parts", 1)
    if type(parts) is not int or not 1 <= parts <= _MOST_PARTS:
        return f"is of messages of {parts} parts"
    if sentinel.worker.stage != 0:
        return None
    return sentinel.problem(state, parts) if can_be_packed(_told(state)) else "has a Sentinel state of another kind"


def _are_baselines(evidence: Any) -> bool:
    """Whether a state's evidence is what ``Collector.state_dict`` gives."""
    baselines = evidence.get("baselines") if isinstance(evidence, dict) else None
    if not isinstance(baselines, dict):
        return False
    return all(str(part).isdecimal() and Baselines.holds(one) for part, one in baselines.items())


def to_tensors(state: Any) -> Any:
    """A nested dict of numpy arrays as tensors, so that ``torch.load`` needs no other class."""
    if isinstance(state, dict):
        return {key: to_tensors(value) for key, value in state.items()}
    return torch.from_numpy(np.ascontiguousarray(state)).reshape(np.shape(state))


def to_arrays(state: Any) -> Any:
    """The inverse of ``to_tensors``; what is no tensor, or one that numpy has no array for, stays what it is."""
    if isinstance(state, dict):
        return {key: to_arrays(value) for key, value in state.items()}
    try:
        return state.cpu().numpy() if isinstance(state, torch.Tensor) else state
    except (TypeError, RuntimeError):
        return state
