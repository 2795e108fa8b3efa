"""The probe: reads each message once where it passes and keeps its row on the device until the step's end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256

import torch

from deepspeed_sentinel.evidence.buffers import Buffers, EndStatistics
from deepspeed_sentinel.evidence.parts import Layout, Seen, as_tokens, describe, digest_of, parts_of
from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.kernels.keyed_digest import DigestKey
from deepspeed_sentinel.kernels.tensor_digest import DIGEST_WORDS
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS, TOKENS
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh
from deepspeed_sentinel.mesh import DIRECTIONS as DIRECTION_NAMES

SECRET = 1  # from here on the sketches whose samples and projections the neighbours of a stage share, and nobody else
ENDS = ((FORWARD, SENT), (FORWARD, RECEIVED), (BACKWARD, SENT), (BACKWARD, RECEIVED))
End = tuple[int, int]
_ToKey = tuple[DigestKey | None, torch.Tensor | None]


class Probe:
    """Statistics of the messages that one worker sends and receives in a step.

    Before ``adopt`` the first message at an end says how many tensors and which hidden sizes to expect there.

    Attributes:
        micro_batches: M of the step.
        ends: those that this worker has.
        kinds: per end, dtype and shape of each tensor of the first message.
        unseen: what could not be judged at first, in words; None unless ``lenient``.
        lenient: leave out what cannot be judged, instead of raising.

    Args:
        mesh: the mesh.
        stage: the stage of this worker.
        device: where messages live.
        seed: of the public sketch's sample and projection; the same on all ranks.
        lenient: see above.
    """

    def __init__(self, mesh: Mesh, stage: int, device: torch.device, seed: int, lenient: bool = False) -> None:
        self._device = device
        self.lenient = lenient
        self.unseen: str | None = None
        self._public_J2 = torch.tensor([[seed, seed]], dtype=torch.int64, device=device)
        self._seeds: dict[End, torch.Tensor] = {}
        self._mesh = mesh
        self._stage = stage
        self._layout: Layout | None = None
        self._expected: dict[End, list[int]] = {}
        self._changed: set[tuple[End, int]] = set()
        self._buffers: dict[tuple[End, int], Buffers] = {}
        self._digests: dict[End, torch.Tensor] = {}
        self._keys: dict[End, list[DigestKey]] = {}
        self._keyed: dict[End, torch.Tensor] = {}
        self._shapes: dict[End, list[int]] = {}
        self._positions: dict[End, list[int]] = {}
        self.kinds: dict[End, tuple[str, ...]] = {}
        self.micro_batches = 0
        first, last = stage == 0, stage == mesh.stages - 1
        absent = {
            (FORWARD, RECEIVED): first,
            (BACKWARD, SENT): first,
            (FORWARD, SENT): last,
            (BACKWARD, RECEIVED): last,
        }
        self.ends = tuple(end for end in ENDS if not absent[end])
        self._next = dict.fromkeys(ENDS, 0)

    def link(self, end: End) -> int:
        """Over which link messages cross at an end."""
        above = end in ((FORWARD, SENT), (BACKWARD, RECEIVED))
        return self._stage if above else self._stage - 1

    def seen(self, end: End) -> Seen | None:
        """What messages were made of up to now, None where this worker has no such end."""
        if end not in self._expected:
            return None
        widths = [0 if (end, part) in self._changed else width for part, width in enumerate(self._expected[end])]
        return Seen(self._digests[end].shape[1], tuple(widths))

    def adopt(self, layout: Layout) -> None:
        """Expect from now on what all ranks agreed on, and leave out what was read of anything else."""
        self._layout = layout
        self._changed.clear()
        for end in self.ends:
            self._expected[end] = layout.of_link(self.link(end))
            if end in self._digests:
                self._digests[end] = _with_slots(self._digests[end], layout.slots)
        self._buffers = {
            (end, part): buffers
            for (end, part), buffers in self._buffers.items()
            if part < layout.parts and self._expected[end][part] == buffers.hidden
        }

    def begin_step(
        self,
        micro_batches: int,
        seeds: Mapping[End, torch.Tensor] | None = None,
        keys: Mapping[End, torch.Tensor] | None = None,
    ) -> None:
        """Start a step of so many micro-batches; rows of the step before are forgotten.

        Args:
            micro_batches: number of messages at each end.
            seeds: per end, int64 [J, 2] on the device, sample and projection seed of each sketch that is taken of
                its messages; row PUBLIC must be equal on all ranks. Ends left out take the public sketch alone.
            keys: per end, int64 [MOST_TENSORS] on the device, of the keyed digests of its messages' tensors. Ends left
                out take none.
        """
        self._seeds = {end: (seeds or {}).get(end, self._public_J2) for end in self.ends}
        jobs_changed = any(len(self._seeds[end]) != len(one.sketch_JMmK) for (end, _), one in self._buffers.items())
        if micro_batches != self.micro_batches or jobs_changed:
            self._buffers.clear()
            self._digests.clear()
            self.micro_batches = micro_batches
        for buffers in self._buffers.values():
            buffers.tokens = [0] * micro_batches
        self._keys = {end: [DigestKey(key_1) for key_1 in keys_K.split(1)] for end, keys_K in (keys or {}).items()}
        self._keyed = {
            end: torch.zeros(micro_batches, len(of_end), dtype=torch.int64, device=self._device)
            for end, of_end in self._keys.items()
        }
        self._shapes = {end: [0] * micro_batches for end in self._keys}
        self._next = dict.fromkeys(ENDS, 0)

    def next_micro_batch(self, end: End) -> int:
        """Identity of the message about to pass: the n-th of its kind in a step is micro-batch n."""
        index = self._next[end]
        assert index < self.micro_batches, (end, index, self.micro_batches)
        self._next[end] = index + 1
        return index

    def observe(self, end: End, micro_batch: int, tensors: Sequence[torch.Tensor]) -> None:
        """Read one message. Nothing waits for the device.

        Args:
            end: direction, and SENT or RECEIVED.
            micro_batch: row to write.
            tensors: all tensors of the message; the floating-point ones are judged, the others are compared by
                checksum.

        Raises:
            ValueError: no floating-point tensor, or no element in any, unless ``lenient``.
        """
        judged = parts_of(tensors)
        problem = self._problem(end, micro_batch, tensors, judged)
        if problem and not self.lenient:
            raise ValueError(problem)
        self.unseen = self.unseen or problem
        if end not in self._digests:
            slots = self._layout.slots if self._layout else len(tensors)
            self._digests[end] = torch.zeros(
                self.micro_batches, slots, DIGEST_WORDS, dtype=torch.int32, device=self._device
            )
        if end not in self._expected:
            self._expected[end] = [as_tokens(tensors[index]).shape[1] for index in judged]
        if end not in self.kinds:
            self.kinds[end] = tuple(describe(tensor) for tensor in tensors)
            self._positions[end] = judged
        digest_T2 = self._digests[end][micro_batch]
        if len(tensors) < len(digest_T2):
            digest_T2[len(tensors) :].zero_()
        if end in self._keys:
            self._shapes[end][micro_batch] = _number(tuple(map(describe, tensors)))
        for index, tensor in enumerate(tensors):
            keyed = self._to_key(end, micro_batch, index)
            into_2 = digest_T2[index] if index < len(digest_T2) else torch.empty_like(digest_T2[-1])
            if index not in judged or not self._read(end, judged.index(index), micro_batch, tensor, into_2, keyed):
                into_2.copy_(digest_of(tensor, *keyed)) if tensor.numel() else into_2.zero_()
            if index >= len(digest_T2):
                digest_T2[-1].mul_(31).add_(into_2)

    def forge_sketch(self, end: End, micro_batch: int, tensors: Sequence[torch.Tensor]) -> None:
        """For drills: put secret sketches of another message in place of the observed one's, where there are any.

        Args:
            end, micro_batch: of a message that was observed.
            tensors: as large as that one's.
        """
        seeds_J2, secret = self._seeds[end], slice(SECRET, None)
        if len(seeds_J2) <= SECRET:
            return
        for part, index in enumerate(parts_of(tensors)):
            buffers = self._buffers.get((end, part))
            if buffers is None or not buffers.tokens[micro_batch]:
                continue
            buffers.read_sketches(micro_batch, as_tokens(tensors[index]), seeds_J2, secret)

    @property
    def changed(self) -> frozenset[tuple[End, int]]:
        """Ends and parts that were seen with another hidden size than expected, or with none."""
        return frozenset(self._changed)

    def parts(self, end: End) -> list[int]:
        """Which parts are judged at an end."""
        return [part for part, width in enumerate(self._expected[end]) if width]

    def judged(self, end: End) -> list[int]:
        """Which tensors of the first message at an end are judged."""
        return [self._positions[end][part] for part in self.parts(end) if part < len(self._positions[end])]

    def end_statistics(self, end: End, scale: float, part: int = 0) -> EndStatistics:
        """The rows of one judged part at one end; ``scale`` undoes gradient accumulation and loss scaling."""
        assert self._next[end] == self.micro_batches, (end, self._next[end], self.micro_batches)
        return self._buffers_of(end, part, self._expected[end][part]).statistics(scale)

    def digests(self, end: End) -> torch.Tensor:
        """int32 [M, T, 2], of the bits of each tensor as they were sent."""
        return self._digests[end]

    def keyed(self, end: End) -> torch.Tensor:
        """int64 [M], one digest a message, under the step's keys: of all its tensors' bits, shapes and dtypes.

        0 where there are no keys. No sender knows it of its own messages.
        """
        if end not in self._keyed:
            return torch.zeros(self.micro_batches, dtype=torch.int64, device=self._device)
        shapes_M = torch.tensor(self._shapes[end], dtype=torch.int64).to(self._device, non_blocking=True)
        return self._keyed[end].sum(1) + shapes_M

    def sketches(self, end: End, jobs: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Sketches float32 [J, P * M, 256, K] and norms float32 [J, P * M, 256] of one end, part by part."""
        if self._layout is None or self._layout.parts == 1:
            buffers = self._buffers_of(end, 0, self._expected[end][0])
            return buffers.sketch_JMmK[jobs], buffers.norms_JMm[jobs]
        every = [self._buffers.get((end, part)) for part in range(self._layout.parts)]
        count = len(self._seeds[end])
        blank = torch.zeros(count, self.micro_batches, TOKENS, DIMENSIONS + 1, device=self._device)
        sketches = [one.sketch_JMmK if one else blank[..., :DIMENSIONS] for one in every]
        norms = [one.norms_JMm if one else blank[..., DIMENSIONS] for one in every]
        return torch.cat([part[jobs] for part in sketches], dim=1), torch.cat([part[jobs] for part in norms], dim=1)

    def tokens(self, end: End, part: int = 0) -> list[int]:
        """How many tokens each micro-batch's message had, 0 where the part was not there or not as agreed on."""
        buffers = self._buffers.get((end, part))
        return buffers.tokens if buffers else [0] * self.micro_batches

    def token_counts(self, end: End) -> torch.Tensor:
        """``tokens`` of all parts, part by part, float32 [P * M] on the device."""
        counts = [
            count for part in range(self._layout.parts if self._layout else 1) for count in self.tokens(end, part)
        ]
        return torch.tensor(counts, dtype=torch.float32).to(self._device, non_blocking=True)

    def _problem(
        self, end: End, micro_batch: int, tensors: Sequence[torch.Tensor], judged: Sequence[int]
    ) -> str | None:
        if not judged:
            return (
                f"{self._name(end)} has no floating-point tensor, got ({', '.join(map(describe, tensors))}): sentinel "
                "judges the hidden state, so a message must carry one. Let the stages pass it, not token ids alone."
            )
        if not any(tensors[index].numel() for index in judged):
            return (
                f"{self._name(end)}, micro-batch {micro_batch}, has zero tokens: its shape is "
                f"{tuple(tensors[judged[0]].shape)}. Drop empty batches before they enter the pipeline."
            )
        return None

    def _to_key(self, end: End, micro_batch: int, index: int) -> _ToKey:
        """Key and place of a tensor's keyed digest."""
        if end not in self._keys:
            return None, None
        return self._keys[end][index], self._keyed[end][micro_batch, index : index + 1]

    def _read(
        self, end: End, part: int, micro_batch: int, tensor: torch.Tensor, digest_2: torch.Tensor, keyed: _ToKey
    ) -> bool:
        """Read a part, its digests included; False if it is not one that is judged."""
        x_TD = as_tokens(tensor)
        expected = self._expected[end]
        if part >= len(expected) or expected[part] != x_TD.shape[1]:
            if self._layout is None or (part < len(expected) and expected[part]):
                self._changed.add((end, part))
            return False
        if x_TD.numel() == 0:
            return False
        self._buffers_of(end, part, expected[part]).read(micro_batch, x_TD, self._seeds[end], digest_2, *keyed)
        return True

    def _buffers_of(self, end: End, part: int, hidden: int) -> Buffers:
        if (end, part) not in self._buffers:
            self._buffers[end, part] = Buffers(self.micro_batches, hidden, len(self._seeds[end]), self._device)
        return self._buffers[end, part]

    def _name(self, end: End) -> str:
        verb = "sent" if end[1] == SENT else "received"
        return f"the {DIRECTION_NAMES[end[0]]} message {verb} by stage {self._stage}"


def _with_slots(digests_MT2: torch.Tensor, slots: int) -> torch.Tensor:
    """[M, T, 2] with more slots, or fewer, of which the last one holds all that follow it."""
    messages, tensors, words = digests_MT2.shape
    if slots >= tensors:
        return torch.cat([digests_MT2, digests_MT2.new_zeros(messages, slots - tensors, words)], dim=1)
    kept_MT2 = digests_MT2[:, :slots].clone()
    for index in range(slots, tensors):
        kept_MT2[:, -1].mul_(31).add_(digests_MT2[:, index])
    return kept_MT2


@lru_cache(maxsize=1024)
def _number(described: tuple[str, ...]) -> int:
    """63 bits of what a message is made of: zeros added to it would change no sum of its elements."""
    return int.from_bytes(sha256(";".join(described).encode()).digest()[:8], "big") >> 1
