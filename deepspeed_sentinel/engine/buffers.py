"""What the forward pass leaves behind in a stage: buffers, put back where a column's step did not count.

Excluding a column masks its gradients. Its messages may also have moved running statistics (BatchNorm), running maxima
(FP8 scaling, quantisers) or router biases, and an honest worker would compute otherwise for as long as those remember,
or for ever after a NaN. So a worker of an excluded column gets the buffers that it began the step with.

A copy of each buffer is taken once and renewed at the beginning of a step only where the buffer may have changed since:
it is another tensor or its version counter moved. Neither waits for the device. Some code changes tensors behind the
counter (``batch_norm`` does, ``.data``, custom kernels). Therefore, after the gate of steps 1, 2, 4, 8, ..., copies are
compared with what is there, and a module with a buffer that was found changed, in whichever way, has all of its buffers
copied at the beginning of every step from then on. One that begins to change behind the counter later goes back to its
older copy until the next comparison: an honest value too.

A buffer above ``_LARGE`` bytes is copied only once its module was seen to change, so that weights kept as buffers
(quantised models) are not held twice. One that was replaced by another tensor goes back all the same. One that first
changes in place in a step that is excluded cannot, which is logged.

A module that keeps count in Python of what its buffers hold (the length of a rotary cache) would contradict buffers
that went back, so numbers, texts and flags in the ``__dict__`` of a module with buffers go back with them.

What counts steps or messages must not go back: all replicas have counted alike, and one that stays behind makes other
messages than they do for good, which a twin step would prove. So a buffer of one element, or a number, stays as it is
where it moved by exactly as much as in the step before.

Other state that a forward pass may keep (tensors as plain attributes, lists, state outside modules) is not known and
stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deepspeed_sentinel.telemetry import console

_LARGE = 2**20
_PLAIN = frozenset((bool, int, float, str, type(None)))


@dataclass
class _Kept:
    """A buffer as it was.

    Attributes:
        tensor: the buffer itself, which may have been changed or replaced since.
        version: its version counter when it was copied, or -1 where it has none.
        copy: its value, or None where it is large and has never changed.
        before: of one element, the value that it had one step earlier; None where that is not known.
    """

    tensor: torch.Tensor
    version: int
    copy: torch.Tensor | None
    before: torch.Tensor | None = None


@dataclass
class _Module:
    """A module's state at the beginning of the step; ``moves`` if it was ever seen to change within one.

    ``earlier``: its numbers one step before.
    """

    buffers: dict[str, _Kept | None] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    earlier: dict[str, Any] = field(default_factory=dict)
    moves: bool = False


class ForwardState:
    """Keeps the buffers of a stage's modules through a step.

    Args:
        root: what the stage runs; modules may come and go.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modules: dict[nn.Module, _Module] = {}
        self._steps = 0

    @torch.no_grad()
    def begin_step(self) -> None:
        """Before the first forward pass: take what may have to go back."""
        stale: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies, and what is to be copied into them
        self._modules = {module: self._modules.get(module, _Module()) for module in _with_buffers(self._root)}
        for module, state in self._modules.items():
            state.earlier, state.numbers = state.numbers, _numbers(module)
            state.buffers = {
                name: None if tensor is None else self._renewed(state.buffers.get(name), tensor, state.moves, stale)
                for name, tensor in module._buffers.items()
            }
        if stale:
            torch._foreach_copy_([copy for copy, _ in stale], [tensor for _, tensor in stale])
        self._steps += 1

    @torch.no_grad()
    def end_step(self, counts: bool) -> None:
        """After the gate: see what changed, or undo it.

        Args:
            counts: the column takes part in this step.
        """
        for module, state in self._modules.items():
            now = dict(module._buffers.items())  # those of a scripted module are no dict
            state.moves = state.moves or any(
                now.get(name) is not None
                if kept is None
                else now.get(name) is not kept.tensor or _version(kept.tensor) != kept.version
                for name, kept in state.buffers.items()
            )
        if not counts:
            for module, state in self._modules.items():
                _put_back(module, state)
        elif self._steps & (self._steps - 1) == 0:
            self._compare()

    def _renewed(
        self,
        kept: _Kept | None,
        tensor: torch.Tensor,
        moves: bool,
        stale: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> _Kept:
        version = _version(tensor)
        if kept is not None and kept.tensor is tensor and kept.version == version and version >= 0 and not moves:
            return kept
        if tensor.numel() * tensor.element_size() > _LARGE and not moves:
            return _Kept(tensor, version, None)
        old = kept.copy if kept is not None else None
        if old is None or not _plain(tensor) or not _alike(old, tensor):
            return _Kept(tensor, version, tensor.detach().clone())
        if tensor.numel() == 1 and tensor.dtype != torch.bool:
            return _Kept(tensor, version, tensor.detach().clone(), before=old)
        stale.append((old, tensor))
        return _Kept(tensor, version, old)

    def _compare(self) -> None:
        """Find modules whose buffers changed behind their version counters."""
        compared = [
            (state, _differs(kept.copy, kept.tensor))
            for state in self._modules.values()
            if not state.moves
            for kept in state.buffers.values()
            if kept is not None and kept.copy is not None and kept.copy.numel()
        ]
        if compared:
            device = compared[0][1].device
            changed = torch.stack([flag.to(device) for _, flag in compared]).tolist()
            for (state, _), moved in zip(compared, changed, strict=True):
                state.moves = state.moves or moved


def _with_buffers(root: nn.Module) -> list[nn.Module]:
    """As ``root.modules()`` finds them, which takes several times as long."""
    found: list[nn.Module] = []
    seen: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if module._buffers:
            found.append(module)
        waiting.extend(module._modules.values())
    return found


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if type(value) in _PLAIN}


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether each can take the other's values."""
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _differs(copy: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """bool []; what cannot be compared (another shape, or sparse) counts as changed."""
    if not _plain(tensor) or not _alike(copy, tensor):
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return (copy != tensor).any()


def _as_it_was(tensor: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """A buffer with its old values: the same tensor, since others may hold it too, or a new one where that cannot be
    written to (made by ``expand``, or in inference mode)."""
    try:
        if _plain(tensor) and _alike(tensor, copy):
            return tensor.copy_(copy)
        tensor.data = copy.clone()
    except RuntimeError:
        return copy.clone()
    return tensor


def _put_back(module: nn.Module, state: _Module) -> None:
    now = dict(module._buffers.items())
    for name in now.keys() - state.buffers.keys():
        del module._buffers[name]
    for name, kept in state.buffers.items():
        module._buffers[name] = None if kept is None else kept.tensor
        if kept is None:
            continue
        if kept.copy is not None:
            module._buffers[name] = _as_it_was(kept.tensor, _counted_on(kept, now.get(name)))
        elif _version(kept.tensor) != kept.version:
            console.say(
                f"buffer {name!r} of {type(module).__name__} ({kept.tensor.numel()} elements) changed for "
                "the first time in a step whose column was excluded, and was too large to be kept: it stays as it is"
            )
    for name, value in state.numbers.items():
        if not _counts_on(module.__dict__.get(name), value, state.earlier.get(name)):
            module.__dict__[name] = value


def _counted_on(kept: _Kept, now: torch.Tensor | None) -> torch.Tensor:
    """The value to put back: that of before the step, or of now where it is a count that went on."""
    assert kept.copy is not None
    if kept.before is None or now is None or not _plain(now) or not _alike(now, kept.copy):
        return kept.copy
    return torch.where(now - kept.copy == kept.copy - kept.before, now, kept.copy)


def _counts_on(now: Any, value: Any, before: Any) -> bool:
    """As ``_counted_on``, of numbers."""
    if not all(type(number) in (int, float) for number in (now, value, before)):
        return False
    return bool(now - value == value - before)
