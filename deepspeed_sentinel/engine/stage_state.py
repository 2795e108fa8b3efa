"""What a stage's modules keep beside their parameters and forward passes change: one state, read and set as a whole.

It is made of the dense buffers of modules, and of numbers, flags, texts and dense tensors in the ``__dict__`` of
modules that have buffers; of numbers and texts those alone that have moved since they were first seen, for one that
never does may be a rank, and none that is the name of one device. What torch's batch normalisation keeps is no part of
it in training, which uses nothing of that. A large tensor is read once for each version of it: a change behind its
version counter is not seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from deepspeed_sentinel.engine.module_state import (
    alike,
    is_batch_norm,
    is_readable,
    numbers,
    size_in_bytes,
    tensors,
    version,
)
from deepspeed_sentinel.engine.packed import strides_of
from deepspeed_sentinel.evidence.statement import raw
from deepspeed_sentinel.evidence.weights import tensors_digest

_LARGE = 2**18  # bytes
_BUFFER, _UNSAVED, _ATTRIBUTE = "buffer", "unsaved buffer", "attribute"
_GONE, _EMPTY, _UNREADABLE = ["gone"], ["empty"], ["unreadable"]
Key = tuple[str, str, str]  # what it is, path of its module, name
State = dict[Key, Any]  # tensors, or what a number is written as


@dataclass(frozen=True)
class _Read:
    """What a large tensor was when it was read."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    value: Any

    def is_of(self, tensor: torch.Tensor) -> bool:
        return self.tensor() is tensor and self.version == version(tensor) >= 0


class StageState:
    """The state of one rank's modules.

    Args:
        root: what the stage runs; modules may come and go.
        first: numbers of a module when it was first seen.
        device: where digests are worked out.
    """

    def __init__(self, root: nn.Module, first: Callable[[nn.Module], dict[str, Any]], device: torch.device) -> None:
        self._root, self._first, self._device = root, first, device
        # tensors that modules had as plain attributes from the beginning, which they will not do without
        self._there = {path: tensors(module).keys() for path, module in root.named_modules()}
        self._digests: dict[Key, _Read] = {}
        self._hashes: dict[Key, _Read] = {}

    def now(self) -> State:
        """What there is now. Tensors are the modules' own."""
        state: State = {}
        for path, module in self._root.named_modules():
            if not module._buffers or (is_batch_norm(module) and module.training):
                continue
            for name, tensor in module._buffers.items():
                readable = tensor is not None and is_readable(tensor)
                kind = _UNSAVED if name in module._non_persistent_buffers_set else _BUFFER
                state[kind, path, name] = _EMPTY if tensor is None else tensor if readable else _UNREADABLE
            state |= {(_ATTRIBUTE, path, name): tensor for name, tensor in tensors(module).items()}
            state |= {(_ATTRIBUTE, path, name): told for name, told in self._moved(module)}
        return dict(sorted(state.items()))

    def digest(self, state: State) -> int:
        """A whole number of 64 bits, never 0; waits for the device."""
        read = [
            self._once(self._digests, key, value, lambda tensor: tensors_digest([tensor], tensor.device))
            if size_in_bytes(value) > _LARGE
            else value
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        ]
        text = repr(
            [(key, strides_of(value) if isinstance(value, torch.Tensor) else value) for key, value in state.items()]
        )
        digest = int(tensors_digest([*read, torch.tensor(zlib.crc32(text.encode()))], self._device))
        return digest or 1

    def entry(self, key: Key, value: Any) -> list[Any]:
        """What a list of what there is says of one thing, for JSON."""
        if not isinstance(value, torch.Tensor):
            return value
        digest = self._once(self._hashes, key, value, lambda tensor: sha(raw(tensor).numpy().data))
        dtype = str(value.dtype).removeprefix("torch.")
        where = [value.device.type != "cpu", digest, size_in_bytes(value)]
        return ["tensor", dtype, list(value.shape), *where, strides_of(value)]

    def adopt(self, mine: State, theirs: State) -> list[str]:
        """Hold this state; names of what changed."""
        modules = dict(self._root.named_modules())
        differs = [key for key in mine.keys() | theirs.keys() if not self._is(key, mine.get(key), theirs.get(key))]
        in_place = self._set_in_place(mine, theirs, set(differs))
        for key in sorted(differs, key=lambda key: (key in theirs, key)):  # what goes may make place for what comes
            kind, path, name = key
            module, told = modules.get(path), theirs.get(key)
            if module is None or key in in_place:
                continue
            place = module.__dict__ if kind == _ATTRIBUTE else module._buffers
            if kind != _ATTRIBUTE and told is not None:
                unsaved = module._non_persistent_buffers_set
                unsaved.add(name) if kind == _UNSAVED else unsaved.discard(name)
            if isinstance(told, torch.Tensor):
                held = mine.get(key)
                place[name] = told.to(held.device) if isinstance(held, torch.Tensor) else told
            elif told == _EMPTY:
                place[name] = None
            elif told is None and kind == _ATTRIBUTE and name in self._first(module):
                place[name] = self._first(module)[name]
            elif told is not None and told != _GONE:
                place[name] = _number(told)
            elif name in dict(place.items()) and (kind != _ATTRIBUTE or name not in self._there.get(path, ())):
                del place[name]  # ``items``, since buffers of a scripted module are no dict
        return sorted(f"{path}.{name}" for _, path, name in differs)

    def _set_in_place(self, mine: State, theirs: State, differs: set[Key]) -> set[Key]:
        """Give tensors their new values where all that is made of the same memory comes out right; those that were."""
        made_of: dict[int, list[Key]] = {}
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                made_of.setdefault(_place(value), []).append(key)
        for module in self._root.modules():
            others = () if module._buffers else tensors(module).values()
            for tensor in (*module.parameters(recurse=False), *others):
                made_of.pop(_place(tensor), None)
        done: set[Key] = set()
        for keys in made_of.values():
            changing = [key for key in keys if key in differs]
            before = {key: mine[key].clone() for key in changing}
            for key in changing:
                _copy(mine[key], theirs.get(key))
                self._hashes.pop(key, None)
                self._digests.pop(key, None)
            if all(self._is(key, mine[key], theirs.get(key)) for key in keys):
                done.update(changing)
                continue
            for key in changing:
                _copy(mine[key], before[key])
        return done

    def _is(self, key: Key, held: Any, told: Any) -> bool:
        """Whether what is held here is what was told, a tensor or an entry of the list; None is nothing."""
        held, told = (self.entry(key, one) if isinstance(one, torch.Tensor) else one for one in (held, told))
        return told == _UNREADABLE or held == told

    def _moved(self, module: nn.Module) -> Iterator[tuple[str, list[Any]]]:
        """Numbers that are not what they were when the module was first seen."""
        now, first = numbers(module), self._first(module)
        for name in first.keys() | now.keys():
            if name not in now and isinstance(module.__dict__.get(name), torch.Tensor):
                continue
            known, told = (_written(some[name]) if name in some else _GONE for some in (first, now))
            if known != told and not _is_device(now.get(name, first.get(name))):
                yield name, told

    def _once(
        self, known: dict[Key, _Read], key: Key, tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]
    ) -> Any:
        """What is read of a tensor; of a large one once for each version."""
        if size_in_bytes(tensor) <= _LARGE:
            return read(tensor)
        if key not in known or not known[key].is_of(tensor):
            known[key] = _Read(weakref.ref(tensor), version(tensor), read(tensor))
        return known[key].value


def sha(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _written(number: Any) -> list[Any]:
    if isinstance(number, np.generic):
        return ["numpy", number.dtype.str, number.tobytes().hex()]
    if type(number) is float:
        return ["float", number.hex()]
    return [type(number).__name__, number]


def _number(written: list[Any]) -> Any:
    kind, value, *more = written
    if kind == "numpy":
        return np.frombuffer(bytes.fromhex(more[0]), np.dtype(value))[0]
    return float.fromhex(value) if kind == "float" else value


def _copy(held: torch.Tensor, given: Any) -> None:
    """Have a tensor hold another one's value, if it can."""
    if not isinstance(given, torch.Tensor) or held.is_inference():
        return
    given = given.to(held.device)
    if alike(held, given):
        with contextlib.suppress(RuntimeError):  # of one made by ``expand``
            held.copy_(given)


def _place(tensor: torch.Tensor) -> int:
    """Equal numbers for what is made of the same memory."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, ValueError):  # sparse ones, subclasses and lazy parameters have none
        return id(tensor)


def _is_device(value: Any) -> bool:
    """The name of one of several, which a module may keep and which is another one on each rank."""
    try:
        return isinstance(value, str) and torch.device(value).index is not None
    except RuntimeError:
        return False
