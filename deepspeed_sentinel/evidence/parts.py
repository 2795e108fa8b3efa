"""The tensors of a message: which are judged, how they are seen as tokens, and what all ranks agree on about them.

Judged is every floating-point tensor, since DeepSpeed sends a gradient for each: the p-th of them is part p, forward
and backward. The others (ids, masks of integers or bools) are compared by their digests alone.

    shape          tokens     hidden
    [..., T, D]    ... x T    D
    [B, C, H, W]   B x H x W  C          four dimensions or more: an image, channels are its features
    [N]            N          1
    []             1          1

A bias or mask of attention, [B, heads, T, T], is seen as an image too: its size may change from message to message, and
the heads do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.table import SENT, ZEROS
from deepspeed_sentinel.kernels.keyed_digest import DigestKey
from deepspeed_sentinel.kernels.tensor_digest import tensor_digest
from deepspeed_sentinel.mesh import FORWARD, Mesh

# DeepSpeed describes a message in 256 integers, two and its dimensions for each tensor: more than these cannot cross.
MOST_TENSORS = 96


def parts_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Which tensors of a message are judged, by their index; part p is the p-th of them."""
    return [index for index, tensor in enumerate(tensors) if tensor.is_floating_point()]


def as_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """A part as x_TD; see the head of this file."""
    if tensor.dim() < 2:
        return tensor.reshape(-1, 1)
    if tensor.dim() >= 4:
        tensor = tensor.movedim(1, -1)
    # -1 would be ambiguous in a tensor without features
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def digest_of(tensor: torch.Tensor, key: DigestKey | None = None, keyed_1: torch.Tensor | None = None) -> torch.Tensor:
    """The digest of any tensor of a message, int32 [2], and the keyed one: as ``observe_message`` gives a part's."""
    return tensor_digest(as_tokens(tensor) if tensor.is_floating_point() else tensor, key, keyed_1)


def describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


@dataclass(frozen=True)
class Layout:
    """What the messages of a run are made of, the same on all ranks.

    Attributes:
        widths: int64 [L, P], hidden size of each part; 0 where there is none or where it changes from message to
            message, and then it is not judged. A message in which a part has another hidden size has no statistics of
            it.
        tensors: int64 [2 directions, L], how many tensors a message has.
    """

    widths: np.ndarray
    tensors: np.ndarray

    @property
    def parts(self) -> int:
        """P."""
        return self.widths.shape[1]

    @property
    def slots(self) -> int:
        """T, how many digests are kept of each message; those of further tensors join the last."""
        return int(self.tensors.max())

    def of_link(self, link: int) -> list[int]:
        """Hidden size of each part, 0 if it is not judged."""
        return [int(width) for width in self.widths[link]]

    def mark(self, digests: np.ndarray, direction: int, link: int) -> np.ndarray:
        """Digests [..., T] of one link's messages, told apart from those of tensors that do not exist: 0."""
        present = np.arange(digests.shape[-1]) < self.tensors[direction, link]
        return np.where(present, digests ^ ZEROS, digests)

    def mark_all(self, digests: np.ndarray) -> np.ndarray:
        """``mark`` for all links: [2 ends, 2 directions, L, C, M, T]."""
        present = np.arange(digests.shape[-1]) < self.tensors[..., None]
        return np.where(present[:, :, None, None], digests ^ ZEROS, digests)


@dataclass(frozen=True)
class Seen:
    """What one rank saw of its messages at one end in its first step.

    Attributes:
        tensors: how many there are in a message.
        widths: hidden size of each part, 0 where it changed.
    """

    tensors: int
    widths: tuple[int, ...]


def agree(
    seen: Sequence[Seen | None],
    mesh: Mesh,
    ranks: np.ndarray,
    ends: Sequence[tuple[int, int]],
    control: Control,
) -> Layout:
    """Gather what all ranks saw; what most of those that saw a link report holds. Collective over ``control``.

    Args:
        seen: per end what this rank saw, None where it has no such end.
        mesh: the mesh.
        ranks: int [S, R], the global rank of each worker.
        ends: direction and SENT or RECEIVED of each end, in that order.
    """
    mine = report(seen)
    everyone = control.all_gather(torch.from_numpy(mine).flatten())
    return combine(everyone.numpy().reshape(ranks.size, *mine.shape)[ranks], mesh, ends)


def report(seen: Sequence[Seen | None]) -> np.ndarray:
    """int64 [ends, 1 + MOST_TENSORS]: number of tensors and widths, -1 where there is no such end."""
    rows = np.full((len(seen), 1 + MOST_TENSORS), -1, np.int64)
    for row, one in zip(rows, seen, strict=True):
        if one is not None:
            row[0], row[1:] = min(one.tensors, MOST_TENSORS), 0
            widths = one.widths[:MOST_TENSORS]
            row[1 : 1 + len(widths)] = widths
    return rows


def combine(reports: np.ndarray, mesh: Mesh, ends: Sequence[tuple[int, int]]) -> Layout:
    """Every worker's ``report``, [S, R, ends, 1 + MOST_TENSORS] -> Layout."""
    tensors = np.zeros((2, mesh.links), np.int64)
    widths = np.zeros((mesh.links, MOST_TENSORS), np.int64)
    for link in range(mesh.links):
        of_link: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for index, (direction, role) in enumerate(ends):
            # Forward messages are sent from below.
            stage = link if (direction == FORWARD) == (role == SENT) else link + 1
            of_link[direction].append(reports[stage, :, index])
        for direction in (0, 1):
            tensors[direction, link] = _most_common(np.concatenate(of_link[direction])[:, 0])
        both = np.concatenate([*of_link[0], *of_link[1]])[:, 1:]
        widths[link] = [_majority(column) for column in both.T]
    used = np.flatnonzero(widths.any(0))
    parts = int(used[-1]) + 1 if len(used) else 1
    return Layout(np.clip(widths[:, :parts], 0, None), np.clip(tensors, 1, MOST_TENSORS))


def _most_common(values: np.ndarray) -> int:
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts == counts.max()].max())


def _majority(values: np.ndarray) -> int:
    """The value that more than half of them have, or 0."""
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()]) if 2 * counts.max() > len(values) else 0
