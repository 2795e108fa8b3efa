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

What all replicas change alike (a count of steps, a temperature that is annealed) must not go back in some of them: who
stays behind makes other messages than the rest for good, which a twin step would prove. ``engine/alike.py`` finds out
what that is.

Other state that a forward pass may keep (tensors as plain attributes, lists, state outside modules) is not known and
stays.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deepspeed_sentinel.evidence.weights import layout, tensors_digest
from deepspeed_sentinel.telemetry import console

_LARGE = 2**20
_PLAIN = frozenset((bool, int, float, str, type(None)))
_AS_TENSOR = {bool: torch.bool, int: torch.int64, float: torch.float64}
UNMOVED = 0  # the digest of what is as it was when the step began
NO_LAYOUT = -1  # of what cannot be given to another replica


@dataclass
class _Kept:
    """A buffer as it was.

    Attributes:
        tensor: the buffer itself, which may have been changed or replaced since.
        version: its version counter when it was copied, or -1 where it has none.
        copy: its value, or None where it is large and has never changed.
    """

    tensor: torch.Tensor
    version: int
    copy: torch.Tensor | None

    @property
    def moved(self) -> bool:
        return _version(self.tensor) != self.version


@dataclass
class _Module:
    """A module's state at the beginning of the step; ``moves`` if it was ever seen to change within one."""

    buffers: dict[str, _Kept | None] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    moves: bool = False


@dataclass(frozen=True)
class _Item:
    """A buffer or a number of a module, which may have come or gone in this step."""

    module: nn.Module
    state: _Module
    name: str
    is_buffer: bool

    @property
    def now(self) -> Any:
        return (self.module._buffers if self.is_buffer else self.module.__dict__).get(self.name)

    @property
    def as_tensor(self) -> torch.Tensor | None:
        """What it holds now in a form that can be sent; None where there is none."""
        value = self.now
        if isinstance(value, torch.Tensor):
            return value.detach() if _plain(value) and not (value.is_quantized or value.is_meta) else None
        try:
            return torch.tensor(value, dtype=_AS_TENSOR[type(value)])
        except (KeyError, OverflowError, RuntimeError):
            return None


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
            state.numbers = _numbers(module)
            state.buffers = {
                name: None if tensor is None else self._renewed(state.buffers.get(name), tensor, state.moves, stale)
                for name, tensor in module._buffers.items()
            }
        if stale:
            torch._foreach_copy_([copy for copy, _ in stale], [tensor for _, tensor in stale])
        self._steps += 1

    @torch.no_grad()
    def moved(self, thorough: bool) -> bool:
        """Whether anything may have moved in this step. After its last message, before ``end_step``.

        Args:
            thorough: look behind the version counters too, which waits for the device.
        """
        for module, state in self._modules.items():
            now = dict(module._buffers.items())  # those of a scripted module are no dict
            state.moves = state.moves or any(
                now.get(name) is not None if kept is None else now.get(name) is not kept.tensor or kept.moved
                for name, kept in state.buffers.items()
            )
        if thorough or self._steps & (self._steps - 1) == 0:
            self._compare()
        return any(state.moves or _numbers(module) != state.numbers for module, state in self._modules.items())

    @property
    def listing(self) -> tuple[int, int]:
        """How much ``digests`` tells of, and a checksum of its names: where both are the same, so is what it is of."""
        names = [f"{item.is_buffer:d}{item.name}" for item in self._items()]
        return len(names), zlib.crc32(" ".join(names).encode())

    @torch.no_grad()
    def digests(self, own: int) -> torch.Tensor:
        """int64 [N, 2] on the CPU: of each thing that may go back what it holds, and its layout. After ``moved``.

        The first is ``UNMOVED``, or a checksum of its value; of what cannot be compared, ``own``. The second is
        ``NO_LAYOUT`` where nobody can be given it.

        Args:
            own: a number that no other replica of the stage has.
        """
        words: list[tuple[int, int]] = []
        tensors: dict[int, torch.Tensor] = {}
        for index, item in enumerate(self._items()):
            word, tensor = UNMOVED, item.as_tensor
            if _may_have_moved(item) and tensor is None:
                word = own if isinstance(item.now, torch.Tensor) else 1 + zlib.crc32(repr(item.now).encode())
            elif _may_have_moved(item):
                tensors[index] = tensors_digest([tensor], tensor.device)
            words.append((word, NO_LAYOUT if tensor is None else layout([tensor])))
        told = torch.tensor(words, dtype=torch.int64).reshape(-1, 2)
        if tensors:
            device = next(iter(tensors.values())).device
            told[list(tensors), 0] = torch.stack([digest.to(device) for digest in tensors.values()]).cpu()
        return told

    def value(self, index: int) -> torch.Tensor:
        """A copy of what the thing of this index in ``digests`` holds, which has a layout."""
        tensor = list(self._items())[index].as_tensor
        assert tensor is not None, index
        return tensor.clone(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def end_step(
        self, counts: bool, stay: Collection[int] = (), given: Mapping[int, torch.Tensor] | None = None
    ) -> None:
        """After the gate: go on, or undo what changed.

        Args:
            counts: the column takes part in this step.
            stay: indices in ``digests`` of what stays as it is although the column does not take part.
            given: by such indices, values of other replicas to be taken instead.
        """
        if not counts:
            for index, item in enumerate(list(self._items())):
                if given and index in given:
                    _give(item, given[index])
                elif index not in stay:
                    _put_back(item)

    def _items(self) -> Iterator[_Item]:
        for module, state in self._modules.items():
            for name in sorted(state.buffers.keys() | dict(module._buffers.items()).keys()):
                yield _Item(module, state, name, is_buffer=True)
            for name in sorted(state.numbers):
                yield _Item(module, state, name, is_buffer=False)

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


def _put_back(item: _Item) -> None:
    module, name = item.module, item.name
    if not item.is_buffer:
        module.__dict__[name] = item.state.numbers[name]
        return
    if name not in item.state.buffers:
        del module._buffers[name]
        return
    kept = item.state.buffers[name]
    module._buffers[name] = None if kept is None else kept.tensor
    if kept is None:
        return
    if kept.copy is not None:
        module._buffers[name] = _as_it_was(kept.tensor, kept.copy)
    elif kept.moved:
        console.say(
            f"buffer {name!r} of {type(module).__name__} ({kept.tensor.numel()} elements) changed for "
            "the first time in a step whose column was excluded, and was too large to be kept: it stays as it is"
        )


def _give(item: _Item, value: torch.Tensor) -> None:
    if item.is_buffer:
        item.module._buffers[item.name] = _as_it_was(item.now, value)
    else:
        item.module.__dict__[item.name] = value.item()


def _may_have_moved(item: _Item) -> bool:
    if not item.is_buffer:
        before = item.state.numbers[item.name]
        return type(item.now) is not type(before) or item.now != before
    kept = item.state.buffers.get(item.name)
    if kept is None or item.state.moves:
        return True
    return item.now is not kept.tensor or kept.moved
