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

To give, a replica sends a list of what its state is made of, with a SHA-256 of each; of the list itself most have told
one. Who differs says which of it is not what it has, and is sent the bits of those. Nothing is looked at before its
size and its digest are what they should be.

Worked example, three replicas that count steps in a buffer: column 1 was left out in step 7, and its workers put back
what they had. Before step 8 the digests are those of 8, 7, 8, and replicas 0 and 2 have counted: replica 1 is given 8,
and in the twin step that follows all three send the same. Were it a running maximum of each one's own data, they would
be those of 3.1, 2.7, 2.9, nobody would be given anything, and this stage would not be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from deepspeed_sentinel.engine.packed import tensor_of
from deepspeed_sentinel.engine.stage_state import Key, StageState, State, sha
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.statement import raw

UNSHARED = 0  # what is told of a state that is not that of all


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
        self._own, self._replica, self._control = StageState(root, first, device), replica, control
        self._device, self._say = device, say
        self._quorum = max((replicas - 1) // 2 + 1, 2)
        self._missed_R = np.zeros(replicas, np.int64)  # steps since all were in one state
        self._counted_R = np.ones(replicas, bool)  # in the last step
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
        state = self._own.now()
        digest = self._own.digest(state)
        told_RW = self._control.of_row(torch.tensor([digest])).numpy()
        if (told_RW == told_RW[0]).all():
            self._missed_R[:] = 0
            return digest
        if gives and self._right(told_RW) is not None and self._give(state):
            self._missed_R[:] = 0
            return self._own.digest(self._own.now())
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
        entries = [[*key, self._own.entry(key, value)] for key, value in state.items()]
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
            if not asked or what[0] != "tensor":
                continue
            size = _bytes_of([what])
            part, rest = rest[:size], rest[size:]
            if sha(part) != what[4]:
                return False
            _, dtype, shape, on_device, *_, strides = what
            bits_N = torch.from_numpy(np.frombuffer(part, np.uint8).copy())
            given[kind, path, name] = tensor_of(bits_N, dtype, shape, strides).to(self._device if on_device else "cpu")
        changed = self._own.adopt(state, given)
        self._say_once(
            "took over from the other replicas of its stage what modules keep beside their weights: "
            + ", ".join(changed)
        )
        return True

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)


def _bytes_of(entry: list[Any]) -> int:
    """How many bits an entry of the list announces, in bytes."""
    what = entry[-1]
    return what[5] if what[0] == "tensor" else 0


def _words(content: bytes) -> tuple[int, int]:
    """Half of a SHA-256, as two whole numbers of 64 bits."""
    first, second = np.frombuffer(hashlib.sha256(content).digest()[:16], "<i8").tolist()
    return first, second
