"""Whether the replicas of a stage hold the same weights: one digest of all their tensors, and what the digests say.

    digest = D(D(t_1), D(t_2), ..., layout)      D: ``kernels/tensor_digest.py``, 64 bits that any device makes alike
    layout = CRC-32 of the tensors' devices, dtypes and shapes, in order, and how many they are

One bit changed in one tensor always changes the digest of its tensor, and the whole but for a chance of 2^-64. It
guards against corruption. It is no cipher, and who lies about its weights may as well lie about their digest: who
computes with other weights than it tells of is for twin steps to show.

Worked example, a stage of three replicas that hold 7, 8, 7: replica 1 is the minority, 0 and 2 are the strict majority,
and 0 is the first who can give replica 1 its tensors. Of two replicas that hold 7, 8 or four that hold 7, 7, 8, 8
nobody knows which are right.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepspeed_sentinel.kernels.tensor_digest import tensor_digest
from deepspeed_sentinel.mesh import Worker

# Tensors are read as rows of this many elements: the digest's weights of a flat one of a whole stage would be as large
# as itself where no kernel makes them, and the kernel wants rows.
WIDTH = 4096
_LARGEST_INTEGER = 8  # bytes that the digest reads as one element


@dataclass(frozen=True)
class Division:
    """A stage whose replicas hold different things.

    Attributes:
        stage: which.
        groups: replicas that hold the same, the largest group first, of equally large ones that of the first replica.
        digests: what each group holds.
    """

    stage: int
    groups: tuple[tuple[int, ...], ...]
    digests: tuple[int, ...]

    @property
    def majority(self) -> tuple[int, ...]:
        """The replicas that hold the same, if they are more than half; else empty."""
        first = self.groups[0]
        return first if 2 * len(first) > sum(map(len, self.groups)) else ()

    @property
    def minority(self) -> tuple[int, ...]:
        """The replicas that hold something else than the majority; empty where there is none."""
        return tuple(sorted(replica for group in self.groups[1:] for replica in group)) if self.majority else ()

    def __str__(self) -> str:
        told = [
            f"{self._names(group)} {'holds' if len(group) == 1 else 'hold'} the digest "
            f"{digest & 0xFFFFFFFFFFFFFFFF:016x}"
            for group, digest in zip(self.groups, self.digests, strict=True)
        ]
        return f"stage {self.stage}: {'; '.join(told)}"

    def _names(self, group: tuple[int, ...]) -> str:
        """A majority in short; of all others people want to know who it is."""
        if group == self.majority:
            return f"{'replica' if len(group) == 1 else 'replicas'} {', '.join(map(str, group))}"
        return ", ".join(str(Worker(self.stage, replica)) for replica in group)


@dataclass(frozen=True)
class Comparison:
    """What one comparison of all stages' replicas came to.

    Attributes:
        step: the engine's global step at whose beginning it was made.
        unequal: who held something else than a strict majority of its stage: proved.
        healed: there are some, and all of them hold what the majority holds now.
        undecided: stages whose replicas differ without a majority. Nobody is accused there.
    """

    step: int
    unequal: tuple[Worker, ...]
    healed: bool
    undecided: tuple[int, ...] = ()


def tensors_digest(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """One number for all bits of a list of tensors: int64 [] on ``device``; nothing waits for the device.

    Order, dtypes and shapes count, strides do not, nor in which order and how often a sparse one names a place.

    Args:
        tensors: of any dtype, shape and device; none may be quantised.
        device: where the result is to be.
    """
    words: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        for part in dense_parts(tensor.detach()):
            for rows in _rows(part):
                words.setdefault(rows.device, []).append(tensor_digest(rows))
    # One copy for all that lie elsewhere: an optimizer may keep thousands of step counts on the host.
    parts = [torch.stack(digests).to(device, non_blocking=True) for digests in words.values()]
    head = torch.tensor([[layout(tensors), len(tensors)]], dtype=torch.int32).to(device, non_blocking=True)
    return tensor_digest(torch.cat([*parts, head])).view(torch.int64)[0]


def dense_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a tensor is made of: itself, or of a sparse one its places, each once, and last the elements there.

    Reading a sparse one waits for its device.
    """
    if tensor.layout == torch.strided:
        return (tensor,)
    once = tensor.to_sparse().coalesce()
    return once.indices(), once.values()


def layout(tensors: Sequence[torch.Tensor]) -> int:
    """A checksum of devices, dtypes and shapes, of 31 bits: who has another one cannot be given these tensors."""
    text = ";".join(
        f"{tensor.device.type} {tensor.dtype} {tuple(tensor.shape)}"
        + (f" {tensor.sparse_dim()}" if tensor.is_sparse else "")
        for tensor in tensors
    )
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


def divisions(digests_SR: np.ndarray) -> tuple[Division, ...]:
    """The stages whose replicas differ, by what each worker told: int64 [S, R]."""
    return tuple(_division(stage, held) for stage, held in enumerate(digests_SR.tolist()) if len(set(held)) > 1)


def _division(stage: int, held: list[int]) -> Division:
    groups: dict[int, list[int]] = {}
    for replica, digest in enumerate(held):
        groups.setdefault(digest, []).append(replica)
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))  # stable: the first replica's comes first
    return Division(stage, tuple(tuple(group) for _, group in ranked), tuple(digest for digest, _ in ranked))


def _rows(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements as rows of ``WIDTH`` [N, WIDTH], and what is left over."""
    flat = tensor.resolve_conj().resolve_neg().reshape(-1)
    if flat.element_size() > _LARGEST_INTEGER:
        flat = flat.view(torch.float64)
    whole = flat.numel() // WIDTH * WIDTH
    if whole:
        yield flat[:whole].view(-1, WIDTH)
    if whole < flat.numel():
        yield flat[whole:]
