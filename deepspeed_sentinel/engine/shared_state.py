"""One state for all replicas of a stage, before a step that may be a twin step.

What modules keep beside their parameters and forward passes change (running maxima, router biases, annealed numbers)
is in what they send. A replica that was left out in a step is behind the others, and honest work of unlike states
cannot be compared. Nor may a worker's word for its state excuse it from being compared: whoever tampers would always
say so. Therefore the replicas of a stage tell a digest of their state before such a step, and after one in which a
column was left out until they are in one state again:

* The state is that which more than half of those tell that were left out least since all were in one, and more of them
  than may be bad. The others are given it, checked against SHA-256. From then on all honest replicas of the stage
  make the same of the same, and everybody is held to it.
* Where there is no such state, it is a replica's own by nature (it follows its data), and nothing that is made of it is
  compared. Fewer bad workers than half of a stage bring that about only together with a replica that was left out.
* A stale state is given to nobody, whoever else says that it is his: those count who were left out least, and of these
  whose column counted in the last step.

The state is made of the dense buffers of modules, and of numbers, flags, texts and dense tensors in the ``__dict__`` of
modules that have buffers; of numbers and texts those alone that have moved since they were first seen, for one that
never does may be a rank, and none that is the name of one device. What torch's batch normalisation keeps is no part of
it in training, which uses nothing of that. A large tensor is read once for each version of it: a change behind its
version counter is not seen.

To give, a replica sends a list of what its state is made of, with a SHA-256 of each; of the list itself most have told
one. Who differs says which of it is not what it has, and is sent the bits of those. Nothing is looked at before its
size and its digest are what they should be.

Worked example, three replicas that count steps in a buffer: column 1 was left out in step 7, and its workers put back
what they had. Before step 8 the digests are those of 8, 7, 8, and replicas 0 and 2 have counted: replica 1 is given 8,
and in the twin step that follows all three send the same. Were it a running maximum of each one's own data, they would
be those of 3.1, 2.7, 2.9, nobody would be given anything, and this stage would not be compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
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
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.statement import raw
from deepspeed_sentinel.evidence.weights import tensors_digest

UNSHARED = 0  # what is told of a state that is not that of all
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


class SharedState:
    """What one rank does so that its stage's replicas begin a step in one state.

    Attributes:
        due: a column was left out since all were in one state.

    Args:
        root: what the stage runs; modules may come and go.
        first: numbers of a module when it was first seen.
        replica, replicas: this worker's, and how many there are.
        control: of the small exchanges.
        device: where digests are worked out.
        say: takes a line for people.
    """

    def __init__(
        self,
        root: nn.Module,
        first: Callable[[nn.Module], dict[str, Any]],
        replica: int,
        replicas: int,
        control: Control,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self._root, self._first, self._replica, self._control = root, first, replica, control
        self._device, self._say = device, say
        self._quorum = max((replicas - 1) // 2 + 1, 2)
        self._missed_R = np.zeros(replicas, np.int64)  # steps since all were in one state
        self._counted_R = np.ones(replicas, bool)  # in the last step
        # tensors that modules had as plain attributes from the beginning, which they will not do without
        self._there = {path: tensors(module).keys() for path, module in root.named_modules()}
        self._digests: dict[Key, _Read] = {}
        self._hashes: dict[Key, _Read] = {}
        self._told: set[str] = set()

    @property
    def due(self) -> bool:
        return bool(self._missed_R.any())

    def left_out(self, out_R: np.ndarray) -> None:
        """Take down whose columns did not count in a step, bool [R]."""
        self._missed_R += out_R
        self._counted_R = ~out_R

    @torch.no_grad()
    def share(self, gives: bool = True) -> int:
        """A number that replicas in one state tell alike; UNSHARED where they are not in one. Collective in the stage.

        Args:
            gives: who differs is given the state that is right.
        """
        state = self._state()
        digest = self._digest(state)
        told_RW = self._control.of_row(torch.tensor([digest])).numpy()
        if (told_RW == told_RW[0]).all():
            self._missed_R[:] = 0
            return digest
        if gives and self._right(told_RW) is not None and self._give(state):
            self._missed_R[:] = 0
            return self._digest(self._state())
        if gives and len(told_RW) > 2:
            self._say_once(
                "what modules of this stage keep beside their weights differs between its replicas, and it is not "
                "known which is right: a twin step compares nothing of it, and strikes convict"
            )
        return UNSHARED

    def _right(self, told_RW: np.ndarray) -> np.ndarray | None:
        """Who tells what is right, bool [R]; None where that is not known."""
        same_RR = (told_RW[:, None] == told_RW[None]).all(-1)
        least = np.sort(self._missed_R)[min(self._quorum, len(told_RW)) - 1]
        heard_R = self._counted_R & (self._missed_R <= least)
        votes_R = (same_RR & heard_R).sum(1)
        first = int(votes_R.argmax())
        enough = votes_R[first] >= self._quorum and 2 * votes_R[first] > np.count_nonzero(heard_R)
        return same_RR[first] if enough else None

    def _give(self, state: State) -> bool:
        """Whether it is known to the last bit what is right; who had something else was given it then."""
        entries = [[*key, self._entry(key, value)] for key, value in state.items()]
        manifest = json.dumps(entries).encode()
        told_RW = self._control.of_row(
            torch.tensor([*_words(manifest), len(manifest), len(entries), sum(map(_bytes_of, entries))])
        ).numpy()
        right_R = self._right(told_RW)
        if right_R is None:
            return False
        right, ill = np.flatnonzero(right_R).tolist(), not right_R[self._replica]
        *_, size, count, most = told_RW[right[0]].tolist()
        for source in right:
            sent = self._sent(manifest, source, size)
            known = not ill or _words(sent) == tuple(told_RW[right[0], :2].tolist())
            theirs = json.loads(sent) if ill and known else entries
            # and one more, so that there is always something to say
            wanted_N = torch.zeros(count + 1, dtype=torch.uint8)
            if ill and known:
                mine = {tuple(entry[:3]): entry[3] for entry in entries}
                for place, entry in enumerate(theirs):
                    wanted_N[place] = mine.get(tuple(entry[:3])) != entry[3]
            asked_N = self._control.of_row(wanted_N)[torch.from_numpy(~right_R), :count].any(0).tolist()
            bits = b""
            if not ill:
                asked = [value for value, asked in zip(state.values(), asked_N, strict=True) if asked]
                bits = b"".join(raw(value).numpy().tobytes() for value in asked if isinstance(value, torch.Tensor))
            sent = self._sent(bits, source, most)
            if ill and known:
                ill = not self._take(state, theirs, asked_N, sent)
            if not self._control.of_row(torch.tensor([int(ill)]))[torch.from_numpy(~right_R)].any():
                break
        return True

    def _sent(self, mine: bytes, source: int, most: int) -> bytes:
        """What a replica sends, at most so many bytes."""
        file_N = torch.frombuffer(bytearray(mine or b"\0"), dtype=torch.uint8)[: len(mine)]
        if source != self._replica:
            file_N = torch.empty(0, dtype=torch.uint8)
        return self._control.of_replica(file_N, source, most=most).numpy().tobytes()

    def _take(self, state: State, theirs: list[list[Any]], asked_N: list[bool], bits: bytes) -> bool:
        """Whether these are the bits that were asked for; then this state is this one's from now on."""
        given: dict[Key, Any] = {}
        rest = memoryview(bits)
        for (kind, path, name, what), asked in zip(theirs, asked_N, strict=True):
            given[kind, path, name] = what
            size = _bytes_of([what])
            if not asked or not size:
                continue
            part, rest = rest[:size], rest[size:]
            if _sha(part) != what[4]:
                return False
            given[kind, path, name] = _tensor(part, what).to(self._device if what[3] else "cpu")
        changed = self._adopt(state, given)
        self._say_once(
            "took over from the other replicas of its stage what modules keep beside their weights: "
            + ", ".join(changed)
        )
        return True

    def _adopt(self, mine: State, theirs: State) -> list[str]:
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
        held, told = (self._entry(key, one) if isinstance(one, torch.Tensor) else one for one in (held, told))
        return told == _UNREADABLE or held == told

    def _state(self) -> State:
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

    def _moved(self, module: nn.Module) -> Iterator[tuple[str, list[Any]]]:
        """Numbers that are not what they were when the module was first seen."""
        now, first = numbers(module), self._first(module)
        for name in first.keys() | now.keys():
            if name not in now and isinstance(module.__dict__.get(name), torch.Tensor):
                continue
            known, told = (_written(some[name]) if name in some else _GONE for some in (first, now))
            if known != told and not _is_device(now.get(name, first.get(name))):
                yield name, told

    def _digest(self, state: State) -> int:
        """Of a state; waits for the device."""
        read = [
            self._once(self._digests, key, value, lambda tensor: tensors_digest([tensor], tensor.device))
            if size_in_bytes(value) > _LARGE
            else value
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        ]
        text = repr(
            [(key, _strides(value) if isinstance(value, torch.Tensor) else value) for key, value in state.items()]
        )
        digest = int(tensors_digest([*read, torch.tensor(zlib.crc32(text.encode()))], self._device))
        return digest if digest != UNSHARED else 1

    def _entry(self, key: Key, value: Any) -> list[Any]:
        """An entry of the list of what there is."""
        if not isinstance(value, torch.Tensor):
            return value
        sha = self._once(self._hashes, key, value, lambda tensor: _sha(raw(tensor).numpy().data))
        dtype = str(value.dtype).removeprefix("torch.")
        where = [value.device.type != "cpu", sha, size_in_bytes(value)]
        return ["tensor", dtype, list(value.shape), *where, _strides(value)]

    def _once(
        self, known: dict[Key, _Read], key: Key, tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]
    ) -> Any:
        """What is read of a tensor; of a large one once for each version."""
        if size_in_bytes(tensor) <= _LARGE:
            return read(tensor)
        if key not in known or not known[key].is_of(tensor):
            known[key] = _Read(weakref.ref(tensor), version(tensor), read(tensor))
        return known[key].value

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)


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


def _bytes_of(entry: list[Any]) -> int:
    """How many bits an entry of the list announces, in bytes."""
    what = entry[-1]
    return what[5] if what[0] == "tensor" else 0


def _tensor(bits: bytes | memoryview, what: list[Any]) -> torch.Tensor:
    _, dtype, shape, *_, strides = what
    flat = torch.frombuffer(bytearray(bits or b"\0"), dtype=torch.uint8)[: len(bits)]
    packed = flat.view(getattr(torch, dtype)).reshape(shape)
    return torch.empty_strided(shape, strides, dtype=packed.dtype).copy_(packed) if strides else packed


def _strides(tensor: torch.Tensor) -> list[int]:
    """Of a dense tensor that is not packed in the order of its axes, on which the last bits of a product may depend."""
    dense = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    steps = np.cumprod([1, *(size for _, size in dense)])[:-1]
    is_dense = tensor.numel() > 0 and all(stride == step for (stride, _), step in zip(dense, steps, strict=True))
    return list(tensor.stride()) if is_dense and not tensor.is_contiguous() else []


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


def _sha(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _words(content: bytes) -> tuple[int, int]:
    """Half of a SHA-256, as two whole numbers of 64 bits."""
    first, second = np.frombuffer(hashlib.sha256(content).digest()[:16], "<i8").tolist()
    return first, second
