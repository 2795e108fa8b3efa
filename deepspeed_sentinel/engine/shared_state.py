"""One state for all replicas of a stage, before a step that may be a twin step.

What modules keep beside their parameters and forward passes change (running maxima, router biases, annealed numbers)
is in what they send. A replica that was left out in a step is behind the others, and honest work of unlike states
cannot be compared. Nor may a worker's word for its state excuse it from being compared: whoever tampers would always
say so. Therefore, before such a step and after one in which a column was left out:

* Every replica of a stage tells a digest of its state. Where more than half of them tell the same, the others are given
  that state by one of those, checked against a cryptographic digest that more than half told as well. From then on all
  honest replicas of the stage make the same of the same, and everybody is held to it.
* Where no more than half tell the same, the state is a replica's own by nature (it follows its data), and nothing that
  is made of it is compared. Bad workers cannot bring that about as long as honest replicas that hold the same are more
  than half.
* A state that only replicas of left-out columns hold is given to nobody: training has gone on without it. Until one of
  their columns has counted, nothing is compared either.

The state is made of the dense buffers of modules, and of numbers, flags and tensors of one element in the ``__dict__``
of modules that have buffers; of numbers those alone that have moved since the beginning, for one that never does may be
a rank. What torch's batch normalisation keeps is no part of it in training, which uses nothing of that. A large buffer
is a part of it once it has changed, and is read once for each version of it: a change behind its version counter shows
in smaller ones alone.

Worked example, three replicas that count steps in a buffer: column 1 was left out in step 7, and its workers put back
what they had. Before step 8 the digests are those of 8, 7, 8: replica 1 is given 8, and in the twin step that follows
all three send the same. Were it a running maximum of each one's own data, they would be those of 3.1, 2.7, 2.9, nobody
would be given anything, and this stage would not be compared.
"""

from __future__ import annotations

import hashlib
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from deepspeed_sentinel.engine.module_state import (
    is_batch_norm,
    is_readable,
    numbers,
    scalars,
    size_in_bytes,
    version,
    with_value,
)
from deepspeed_sentinel.engine.parcel import from_bytes, most_bytes, to_bytes
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.weights import tensors_digest

_LARGE = 2**18  # bytes
_BUFFER, _SCALAR, _NUMBER = range(3)
_GONE, _NUMPY = "gone", "numpy"  # of a number that was there at the beginning; of a scalar of numpy's
Key = tuple[int, str, str]  # what it is, path of its module, name
State = dict[Key, Any]


class SharedState:
    """What one rank does so that its stage's replicas begin a step in one state.

    Args:
        root: what the stage runs; modules may come and go.
        replica: this worker's.
        control: of the small exchanges.
        device: where digests are worked out.
        say: takes a line for people.
    """

    def __init__(
        self, root: nn.Module, replica: int, control: Control, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._root, self._replica, self._control, self._device, self._say = root, replica, control, device, say
        self._first = {path: numbers(module) for path, module in root.named_modules()}
        # of large buffers, where they lay and in which version, when nothing had changed them
        self._untouched = {key: _seen(tensor) for key, tensor in self._buffers() if size_in_bytes(tensor) > _LARGE}
        self._read: dict[Key, tuple[tuple[weakref.ref[torch.Tensor], int], torch.Tensor]] = {}
        self._told: set[str] = set()

    @torch.no_grad()
    def share(self, counted_R: np.ndarray, gives: bool = True) -> int:
        """A number that replicas in one state tell alike. Collective in the stage.

        Args:
            counted_R: bool [R], replicas of this stage whose columns counted in the last step.
            gives: who differs from most is given their state.
        """
        state = self._state()
        digest = self._digest(state)
        told_R = self._control.of_row(torch.tensor([digest])).numpy()
        most_R = _most(told_R)
        if most_R is None:
            if len(told_R) > 2:
                self._say_once(
                    "what modules of this stage keep beside their weights differs between its replicas, and no more "
                    "than half hold the same: its twin steps compare nothing, and strikes convict"
                )
            return digest
        if most_R.all():
            return digest
        if gives and (most_R & counted_R).any() and self._give(state):
            return self._digest(self._state())
        return -1 - self._replica  # no two say the same

    def _give(self, state: State) -> bool:
        """Whether more than half hold the same to the last bit; who did not was given it."""
        mine = [[list(key), value] for key, value in state.items()]
        told_RW = self._control.of_row(torch.tensor(_fingerprint(mine))).numpy()
        right_R = _most(told_RW)
        if right_R is None:
            return False
        right, ill = np.flatnonzero(right_R).tolist(), not right_R[self._replica]
        for source in right:
            file_N = to_bytes(mine) if source == self._replica else torch.empty(0, dtype=torch.uint8)
            file_N = self._control.of_replica(file_N, source, most=most_bytes(mine))
            ill = ill and not self._take(file_N, tuple(told_RW[right[0]].tolist()))
            if not self._control.of_row(torch.tensor([int(ill)])).any():
                break
        return True

    def _take(self, file_N: torch.Tensor, wanted: tuple[int, int]) -> bool:
        """Whether what another replica has sent is what most hold; then it is this one's from now on."""
        try:
            theirs = from_bytes(file_N, self._device)
            if _fingerprint(theirs) != wanted:
                return False
        except Exception as error:  # bytes of a stranger
            self._say_once(f"another replica of this stage sent no state: {error}")
            return False
        changed = self._adopt({(kind, path, name): value for (kind, path, name), value in theirs})
        self._say_once(
            "took over from the other replicas of its stage what modules keep beside their weights: "
            + ", ".join(changed)
        )
        return True

    def _adopt(self, theirs: State) -> list[str]:
        """Hold this state; names of what changed."""
        modules, mine, changed = dict(self._root.named_modules()), self._state(), []
        for key in mine.keys() | theirs.keys():
            kind, path, name = key
            module = modules.get(path)
            if module is None:
                continue
            if key in mine and key in theirs and _fingerprint([mine[key]]) == _fingerprint([theirs[key]]):
                continue
            changed.append(f"{path}.{name}")
            self._read.pop(key, None)
            if kind == _NUMBER:
                self._set_number(module, path, name, theirs.get(key))
            elif key not in theirs:
                self._take_away(key, module, mine[key])
            else:
                place = module._buffers if kind == _BUFFER else module.__dict__
                held = dict(place.items()).get(name)  # those of a scripted module are no dict
                given = theirs[key].clone()
                place[name] = given if held is None else with_value(held, given.to(held.device))
        return sorted(changed)

    def _set_number(self, module: nn.Module, path: str, name: str, value: Any) -> None:
        """``value`` is as in ``_state``; None where the others' never moved."""
        first = self._first.get(path, {})
        if value is None and name in first:
            module.__dict__[name] = first[name]
        elif value is None or value == [_GONE]:
            module.__dict__.pop(name, None)
        elif value[0] == _NUMPY:
            module.__dict__[name] = np.frombuffer(bytes.fromhex(value[2]), np.dtype(value[1]))[0]
        else:
            module.__dict__[name] = value[0]

    def _take_away(self, key: Key, module: nn.Module, tensor: torch.Tensor) -> None:
        """What the others do not hold: a buffer or a tensor of one element."""
        kind, _, name = key
        if kind == _SCALAR:
            module.__dict__.pop(name, None)
        elif size_in_bytes(tensor) > _LARGE:
            self._untouched[key] = _seen(tensor)  # theirs never changed
        else:
            module._buffers[name] = None

    def _buffers(self) -> Iterator[tuple[Key, torch.Tensor]]:
        for path, module in self._root.named_modules():
            if module._buffers and not (is_batch_norm(module) and module.training):
                for name, tensor in module._buffers.items():
                    if tensor is not None and is_readable(tensor):
                        yield (_BUFFER, path, name), tensor

    def _state(self) -> State:
        """What there is now. Tensors are the modules' own; numbers stand in lists."""
        state: State = {
            key: tensor
            for key, tensor in self._buffers()
            if size_in_bytes(tensor) <= _LARGE or not _is(tensor, self._untouched.get(key))
        }
        for path, module in self._root.named_modules():
            if not module._buffers or (is_batch_norm(module) and module.training):
                continue
            state |= {(_SCALAR, path, name): tensor for name, tensor in scalars(module).items()}
            now = numbers(module)
            first = self._first.setdefault(path, now)
            for name in first.keys() | now.keys():
                known, told = (_told(some[name]) if name in some else [_GONE] for some in (first, now))
                # A text is the name of a device, as a rule.
                if repr(known) != repr(told) and not isinstance(now.get(name, first.get(name)), str):
                    state[_NUMBER, path, name] = told
        return dict(sorted(state.items()))

    def _digest(self, state: State) -> int:
        """Of a state; waits for the device."""
        tensors = []
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors.append(self._digest_of_large(key, value) if size_in_bytes(value) > _LARGE else value)
        text = repr([(key, None if isinstance(value, torch.Tensor) else value) for key, value in state.items()])
        return int(tensors_digest([*tensors, torch.tensor(zlib.crc32(text.encode()))], self._device))

    def _digest_of_large(self, key: Key, tensor: torch.Tensor) -> torch.Tensor:
        known = self._read.get(key)
        if known is None or not _is(tensor, known[0]):
            known = self._read[key] = (_seen(tensor), tensors_digest([tensor], tensor.device))
        return known[1]

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)


def _most(told_RW: np.ndarray) -> np.ndarray | None:
    """Who says what more than half of all say, bool [R]; None where there is no such thing."""
    same_RR = (told_RW[:, None] == told_RW[None]).all(-1)
    first = int(same_RR.sum(1).argmax())
    return same_RR[first] if 2 * np.count_nonzero(same_RR[first]) > len(told_RW) else None


def _seen(tensor: torch.Tensor) -> tuple[weakref.ref[torch.Tensor], int]:
    return weakref.ref(tensor), version(tensor)


def _is(tensor: torch.Tensor, seen: tuple[weakref.ref[torch.Tensor], int] | None) -> bool:
    """It is the tensor that was seen, and its counter has not moved."""
    return seen is not None and seen[0]() is tensor and seen[1] == version(tensor) >= 0


def _told(number: Any) -> list[Any]:
    if isinstance(number, np.generic):
        return [_NUMPY, number.dtype.str, number.tobytes().hex()]
    return [number]


def _fingerprint(parts: list[Any]) -> tuple[int, int]:
    """Of nested lists of numbers, texts and tensors: half of a SHA-256, as two whole numbers of 64 bits."""
    sha = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            sha.update(f"tensor {part.dtype} {tuple(part.shape)};".encode())
            bits = part.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            sha.update(bits.numpy().data)
        elif isinstance(part, list):
            sha.update(f"list {len(part)};".encode())
            for one in part:
                add(one)
        else:
            sha.update(f"{part!r};".encode())

    add(parts)
    first, second = np.frombuffer(sha.digest()[:16], "<i8").tolist()
    return first, second
