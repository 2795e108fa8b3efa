"""What a neighbour of a stage tells the auditor, and its bytes: a header of fixed size, then raw values.

The auditor knows nothing of who wrote the bytes. Every number of the header is checked before memory is taken for what
it announces, the values are as many as the header says to the byte, and nothing in them is ever executed.

    header   int64 [WORDS], little-endian: version; micro-batch; number of seeds, seeds; number of parts, a bit for each
             that something is known of; number of tensors; for each of these dtype code, dimensions, shape. What is not
             used is zero.
    body     for each known part float32 [K], [K, K]; then the tensors one after the other, contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepspeed_sentinel.evidence.transfer import Known
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS

# DeepSpeed describes a message in 256 integers, two and its dimensions for each tensor: more than these cannot cross.
MOST_TENSORS, _MOST_DIMENSIONS, _MOST_SEEDS = 96, 8, 8
_VERSION = 1
SEEDS = 3  # of a statement; a header has room for more
_DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128),
)
_COUNTS = 3  # of seeds, parts and tensors
_KNOWN_WORDS = 2
_PER_TENSOR = 2 + _MOST_DIMENSIONS
WORDS = 2 + _COUNTS + _MOST_SEEDS + _KNOWN_WORDS + MOST_TENSORS * _PER_TENSOR
_KNOWN_VALUES = DIMENSIONS + DIMENSIONS * DIMENSIONS


Kind = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor


class Malformed(ValueError):
    """These bytes are no statement; the text says why."""


@dataclass(frozen=True)
class Header:
    """All of a statement but its values.

    Attributes:
        micro_batch: which message was kept.
        seeds: of its sketches.
        known: of each judged part whether anything was known.
        tensors: dtype and shape of each.
    """

    micro_batch: int
    seeds: tuple[int, ...]
    known: tuple[bool, ...]
    tensors: tuple[Kind, ...]

    @property
    def body_bytes(self) -> int:
        """How many bytes follow."""
        return 4 * _KNOWN_VALUES * sum(self.known) + sum(_bytes_of(*tensor) for tensor in self.tensors)

    def to_words(self) -> np.ndarray:
        """int64 [WORDS]; raises as ``check_kinds`` does."""
        check_kinds(self.tensors)
        assert len(self.seeds) <= _MOST_SEEDS and len(self.known) <= MOST_TENSORS, (self.seeds, self.known)
        words = [_VERSION, self.micro_batch, len(self.seeds), *_filled(self.seeds, _MOST_SEEDS), len(self.known)]
        bits = sum(known << part for part, known in enumerate(self.known))
        half = 1 << 48
        words += [bits % half, bits // half, len(self.tensors)]
        for dtype, shape in self.tensors:
            words += [_DTYPES.index(dtype), len(shape), *_filled(shape, _MOST_DIMENSIONS)]
        return np.array(_filled(words, WORDS), np.dtype("<i8"))

    @classmethod
    def from_words(cls, words: np.ndarray, most_bytes: int) -> Header:
        """The inverse of ``to_words``.

        Args:
            words: int64 [WORDS], by a stranger.
            most_bytes: what to take for all tensors together.

        Raises:
            Malformed: it is not what ``to_words`` makes of any message of at most so many bytes.
        """
        numbers = iter(words.tolist())

        def take(what: str, most: int, least: int = 0) -> int:
            number = next(numbers)
            if not least <= number <= most:
                raise Malformed(f"{what} is {number}, allowed: {least} to {most}")
            return number

        def several(count: int, room: int, what: str, most: int, least: int = 0) -> tuple[int, ...]:
            taken = tuple(take(what, most, least) for _ in range(count))
            for _ in range(room - count):
                take("an unused word", 0)
            return taken

        take("the version", _VERSION, _VERSION)
        micro_batch = take("the micro-batch", 2**31)
        seeds = several(take("the number of seeds", _MOST_SEEDS), _MOST_SEEDS, "a seed", 2**63 - 1, -(2**63))
        parts = take("the number of parts", MOST_TENSORS)
        bits = take("the known parts", 2**48 - 1) + (take("the known parts", 2**48 - 1) << 48)
        if bits >> parts:
            raise Malformed(f"something is known of more than {parts} parts")
        known = tuple(bool(bits >> part & 1) for part in range(parts))
        tensors = []
        left = most_bytes
        count = take("the number of tensors", MOST_TENSORS, 1)
        for index in range(MOST_TENSORS):
            if index >= count:
                several(0, _PER_TENSOR, "", 0)
                continue
            dtype = _DTYPES[take("a dtype", len(_DTYPES) - 1)]
            dimensions = take("the number of dimensions", _MOST_DIMENSIONS)
            shape = several(dimensions, _MOST_DIMENSIONS, "a dimension", most_bytes)
            left -= _bytes_of(dtype, shape)
            # A size of zero makes any others cost no byte, and their product may still be too large to compute with.
            if left < 0 or _bytes_of(dtype, tuple(max(size, 1) for size in shape)) > most_bytes:
                raise Malformed(f"the tensors have more than {most_bytes} bytes")
            tensors.append((dtype, shape))
        return cls(micro_batch, seeds, known, tuple(tensors))


@dataclass(frozen=True)
class Statement:
    """What one neighbour of a stage tells the auditor about one direction.

    Attributes:
        micro_batch: which it kept.
        seeds: of this step's sample, of its fresh projection, and of the lasting one.
        known: what the statistics of the pair were measured against, part by part; None before anything was learnt.
        tensors: all tensors of the message.
    """

    micro_batch: int
    seeds: tuple[int, ...]
    known: tuple[Known | None, ...]
    tensors: tuple[torch.Tensor, ...]

    @property
    def header(self) -> Header:
        return Header(
            self.micro_batch, self.seeds, tuple(one is not None for one in self.known), kinds_of(self.tensors)
        )

    def body(self) -> torch.Tensor:
        """uint8 [N] on the CPU."""
        known = [tensor for one in self.known if one for tensor in (one.expected_K, one.w_KK)]
        return torch.cat([raw(tensor) for tensor in (*known, *self.tensors)])

    @classmethod
    def from_parts(cls, header: Header, body_N: torch.Tensor, device: torch.device) -> Statement:
        """From a header and the uint8 [N] that follow it, its tensors on ``device``.

        Raises:
            Malformed: another number of bytes than the header announces, or of seeds than a statement has, a truth
                value that is neither, or a shape that no tensor can have.
        """
        if body_N.numel() != header.body_bytes:
            raise Malformed(f"{body_N.numel()} bytes of values, the header announces {header.body_bytes}")
        if len(header.seeds) != SEEDS:
            raise Malformed(f"{len(header.seeds)} seeds, a statement has {SEEDS}")
        taken = 0

        def take(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
            nonlocal taken
            raw_N = body_N[taken : taken + _bytes_of(dtype, shape)]
            taken += raw_N.numel()
            if dtype == torch.bool and bool((raw_N > 1).any()):
                raise Malformed("a truth value that is neither")
            aligned_N = raw_N.clone()
            try:
                tensor = aligned_N.view(dtype).reshape(shape)  # takes no memory, so this is not why it fails
            except RuntimeError as error:
                raise Malformed(f"no {dtype} of the shape {shape}: {error}") from error
            return tensor.to(device)

        known = tuple(
            Known(take(torch.float32, (DIMENSIONS,)), take(torch.float32, (DIMENSIONS, DIMENSIONS))) if there else None
            for there in header.known
        )
        return cls(header.micro_batch, header.seeds, known, tuple(take(*kind) for kind in header.tensors))


def kinds_of(tensors: Sequence[torch.Tensor]) -> tuple[Kind, ...]:
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)


def check_kinds(kinds: Sequence[Kind]) -> None:
    """Whether a message can be kept for an audit.

    Raises:
        ValueError: more tensors or dimensions than a header holds, or a dtype that it has no code for.
    """
    if len(kinds) > MOST_TENSORS:
        raise ValueError(f"a message has {len(kinds)} tensors, allowed: {MOST_TENSORS}. Let the stages pack them.")
    for dtype, shape in kinds:
        if dtype not in _DTYPES or len(shape) > _MOST_DIMENSIONS:
            raise ValueError(
                f"a message holds a tensor {dtype} of {len(shape)} dimensions, which sentinel cannot keep for an "
                f"audit. Allowed: {_MOST_DIMENSIONS} dimensions, {', '.join(str(one)[6:] for one in _DTYPES)}. Let the "
                "stages pass it as one of these."
            )


def _filled(values: list[int] | tuple[int, ...], room: int) -> list[int]:
    return [*values, *[0] * (room - len(values))]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a dense tensor of whole bytes, in the order of its axes: uint8 [N] on the CPU."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bool:
        tensor = tensor.view(torch.uint8)  # a copy of flags makes 1 of every byte that is not 0
    flat_N = tensor.contiguous().reshape(-1)
    # a single element that was expanded is contiguous with a stride of 0, which no view of its bytes can have
    return flat_N.as_strided(flat_N.shape, (1,)).view(torch.uint8)


def _bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize
