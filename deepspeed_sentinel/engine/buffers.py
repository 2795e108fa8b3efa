"""What the forward pass leaves behind in a stage: buffers, put back where a column's step did not count.

Excluding a column masks its gradients. Its messages may also have moved running statistics (BatchNorm), running maxima
(FP8 scaling, quantisers) or router biases, and an honest worker would compute otherwise for as long as those remember,
or for ever after a NaN. So a worker of an excluded column gets the buffers that it began the step with.

A copy of each buffer is taken once and renewed at the beginning of a step only where the buffer may have changed since:
it is another tensor or its version counter moved. Neither waits for the device. Some code changes tensors behind the
counter (``batch_norm`` does, ``.data``, custom kernels). Therefore, after the gate of steps 1, 2, 4, 8, ..., copies are
compared with what is there, and a module with a buffer that was found changed, in whichever way, has all of its buffers
copied at the beginning of every step from then on. One that begins to change behind the counter later goes back to its
older copy until the next comparison: an honest value too. Comparisons are made in each step that excludes a column too,
by all; a step that is rehearsed begins with fresh copies of all, and of modules without buffers.

A buffer above ``_LARGE`` bytes is copied only once its module was seen to change, so that weights kept as buffers
(quantised models) are not held twice; a digest is compared in place of a copy. One that was replaced by another tensor
goes back all the same. One that first changes in place in a step that is excluded cannot, which is logged.

A module that keeps count in Python of what its buffers hold (the length of a rotary cache) would contradict buffers
that went back, so numbers, texts, flags and tensors in the ``__dict__`` of a module with buffers go back with them. Of
these tensors those of one element are copied; a larger one, such as a table of so many rows, is another tensor when it
changes, as a rule, and it is the old one that goes back.

What counts steps or messages should not go back: all replicas have counted alike, and one that stays behind makes
other messages than they do for good. So a buffer of one element, or a number, stays as it is where it moved by exactly
as much as in the step before. What replicas change alike in another way stays behind, until they are brought into one
state again (``shared_state.py``).

Other state that a forward pass may keep (larger tensors as plain attributes that change in place, lists, state outside
modules, modules and first buffers that came in the step) is not known and stays.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deepspeed_sentinel.engine.module_state import (
    alike,
    has_values,
    is_plain,
    is_readable,
    numbers,
    size_in_bytes,
    tensors,
    version,
    with_value,
)
from deepspeed_sentinel.evidence.weights import tensors_digest
from deepspeed_sentinel.telemetry import console

_LARGE = 2**20


@dataclass
class _Kept:
    """A buffer as it was.

    Attributes:
        tensor: the buffer itself, which may have been changed or replaced since.
        version: its version counter when it was copied, or -1 where it has none.
        copy: its value, or None where it is large and has never changed, or cannot be copied.
        digest: of its value, int64 [], in place of a copy of a large one.
        before: of one element, the value that it had one step earlier; None where that is not known.
    """

    tensor: torch.Tensor
    version: int
    copy: torch.Tensor | None
    digest: torch.Tensor | None = None
    before: torch.Tensor | None = None

    def differs(self) -> torch.Tensor:
        """bool []: the tensor holds another value by now."""
        if self.copy is not None:
            return _differs(self.copy, self.tensor)
        if self.digest is None or not is_readable(self.tensor):
            return torch.zeros((), dtype=torch.bool)
        return tensors_digest([self.tensor], self.tensor.device) != self.digest


@dataclass
class _Module:
    """A module's state at the beginning of the step.

    Attributes:
        buffers, numbers: what it held; earlier: its numbers one step before.
        tensors: those that are plain attributes, and copies of those of one element.
        moves: its buffers were seen to change within a step.
    """

    buffers: dict[str, _Kept | None] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    earlier: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    moves: bool = False


class ForwardState:
    """Keeps the buffers of a stage's modules through a step.

    Args:
        root: what the stage runs; modules may come and go.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modules: dict[nn.Module, _Module] = {}
        self._first = weakref.WeakKeyDictionary({module: numbers(module) for module in _modules(root)})
        self._steps = 0

    @torch.no_grad()
    def begin_step(self, everything: bool = False) -> None:
        """Before the first forward pass: take what may have to go back.

        Args:
            everything: ``rewind`` comes, so all copies have to be of now, and of all modules.
        """
        stale: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies, and what is to be copied into them
        found = [module for module in _modules(self._root) if everything or module._buffers]
        self._modules = {module: self._modules.get(module, _Module()) for module in found}
        for module, state in self._modules.items():
            state.earlier, state.numbers = state.numbers, numbers(module)
            self._first.setdefault(module, state.numbers)
            state.tensors = {
                name: (tensor, tensor.detach().clone() if tensor.numel() == 1 else None)
                for name, tensor in tensors(module).items()
            }
            state.buffers = {
                name: None if tensor is None else self._renewed(state, name, tensor, everything, stale)
                for name, tensor in module._buffers.items()
            }
        if stale:
            torch._foreach_copy_([copy for copy, _ in stale], [tensor for _, tensor in stale])
        self._steps += 1

    def first(self, module: nn.Module) -> dict[str, Any]:
        """Its numbers when it was first seen: at the beginning, or of the first step after it came."""
        return self._first.setdefault(module, numbers(module))

    @torch.no_grad()
    def rewind(self) -> None:
        """Undo all that passes changed since ``begin_step(everything=True)``, counts too, as if they had not been."""
        for module, state in self._modules.items():
            _put_back(module, state, counts_on=False)
            for name, kept in state.buffers.items():
                tensor = module._buffers[name]
                if kept is not None and tensor is not None:
                    kept.tensor, kept.version = tensor, version(tensor)

    @torch.no_grad()
    def end_step(self, counts: bool, all_count: bool = True) -> None:
        """After the gate: see what changed, or undo it.

        Args:
            counts: the column takes part in this step.
            all_count: all columns do.
        """
        for module, state in self._modules.items():
            now = dict(module._buffers.items())  # those of a scripted module are no dict
            state.moves = state.moves or any(
                now.get(name) is not None
                if kept is None
                else now.get(name) is not kept.tensor or version(kept.tensor) != kept.version
                for name, kept in state.buffers.items()
            )
        if not (counts and all_count) or self._steps & (self._steps - 1) == 0:
            self._compare()
        if not counts:
            for module, state in self._modules.items():
                if state.buffers:  # others were kept for a rehearsal alone
                    _put_back(module, state, counts_on=True)

    def _renewed(
        self,
        state: _Module,
        name: str,
        tensor: torch.Tensor,
        everything: bool,
        stale: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> _Kept:
        kept, now = state.buffers.get(name), version(tensor)
        if not has_values(tensor):
            return _Kept(tensor, now, None)
        whole = everything or state.moves  # whatever its size, and whether or not it is seen to have changed
        large = size_in_bytes(tensor) > _LARGE and not whole
        same = kept is not None and kept.tensor is tensor and kept.version == now >= 0 and not whole
        if kept is not None and same and (not large or kept.copy is None):
            return kept
        if large:
            digest = tensors_digest([tensor], tensor.device) if is_readable(tensor) else None
            return _Kept(tensor, now, None, digest)
        old = kept.copy if kept is not None else None
        if old is None or not is_plain(tensor) or not alike(old, tensor):
            return _Kept(tensor, now, _cloned(tensor))
        if tensor.numel() == 1 and tensor.dtype != torch.bool:
            return _Kept(tensor, now, _cloned(tensor), before=old)
        stale.append((old, tensor))
        return _Kept(tensor, now, old)

    def _compare(self) -> None:
        """Find modules whose buffers changed behind their version counters."""
        compared = [
            (state, kept.differs())
            for state in self._modules.values()
            if not state.moves
            for kept in state.buffers.values()
            if kept is not None and has_values(kept.tensor) and kept.tensor.numel()
        ]
        if compared:
            device = compared[0][1].device
            changed = torch.stack([flag.to(device) for _, flag in compared]).tolist()
            for (state, _), moved in zip(compared, changed, strict=True):
                state.moves = state.moves or moved


def _modules(root: nn.Module) -> list[nn.Module]:
    """As ``root.modules()`` finds them, which takes several times as long."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting.extend(module._modules.values())
    return list(found)


def _cloned(tensor: torch.Tensor) -> torch.Tensor | None:
    """None of a kind of tensor that torch cannot copy yet."""
    try:
        return tensor.detach().clone()
    except (RuntimeError, TypeError):
        return None


def _differs(copy: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """bool []; what cannot be compared (another shape, sparse, or of bits) counts as changed."""
    if is_plain(tensor) and alike(copy, tensor):
        try:
            return ((copy != tensor) & ((copy == copy) | (tensor == tensor))).any()  # NaN is no change of NaN
        except RuntimeError:
            pass
    return torch.ones((), dtype=torch.bool, device=tensor.device)


def _put_back(module: nn.Module, state: _Module, counts_on: bool) -> None:
    now = dict(module._buffers.items())
    for name in now.keys() - state.buffers.keys():
        del module._buffers[name]
    for name, kept in state.buffers.items():
        changed = kept is not None and kept.copy is None and bool(kept.differs())
        module._buffers[name] = None if kept is None else kept.tensor
        if kept is None:
            continue
        if kept.copy is not None:
            value = _counted_on(kept, now.get(name)) if counts_on else kept.copy
            module._buffers[name] = with_value(kept.tensor, value)
        elif changed or version(kept.tensor) != kept.version:
            console.say(
                f"buffer {name!r} of {type(module).__name__} ({kept.tensor.numel()} elements) changed for "
                "the first time in a step whose column was excluded, and was too large to be kept: it stays as it is"
            )
    for name in numbers(module).keys() - state.numbers.keys():
        del module.__dict__[name]
    for name in tensors(module).keys() - state.tensors.keys():
        del module.__dict__[name]
    for name, (tensor, copy) in state.tensors.items():
        module.__dict__[name] = tensor if copy is None else with_value(tensor, copy)
    taken = {*module._modules.keys(), *module._parameters.keys()}
    for name, value in state.numbers.items():
        if name not in taken and not (
            counts_on and _counts_on(module.__dict__.get(name), value, state.earlier.get(name))
        ):
            module.__dict__[name] = value


def _counted_on(kept: _Kept, now: torch.Tensor | None) -> torch.Tensor:
    """The value to put back: that of before the step, or of now where it is a count that went on."""
    assert kept.copy is not None
    if kept.before is None or now is None or not is_plain(now) or not alike(now, kept.copy):
        return kept.copy
    try:
        step = now - kept.copy
        return torch.where((step == kept.copy - kept.before) & step.isfinite(), now, kept.copy)
    except RuntimeError:  # no arithmetic of unsigned integers of 16 bits and more
        return kept.copy


def _counts_on(now: Any, value: Any, before: Any) -> bool:
    """As ``_counted_on``, of numbers."""
    if not all(type(number) in (int, float) for number in (now, value, before)):
        return False
    return bool(now - value == value - before) and math.isfinite(now - value)
