"""Parts of micro-batches on their way to other replicas: what they are made of, and as bytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepspeed_sentinel.engine import packed
from deepspeed_sentinel.engine.packed import pack, text_bytes, unpack

# Replicas draw alike, so a parcel of another one is about as large as one's own. Where lengths differ it may be so many
# times as large, or have so many bytes.
_TIMES, _FREE_BYTES = 16, 1 << 28


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Tensors in nested tuples, lists and dicts replaced; all else stays as it is.

    Example: ``map_tensors([a, {"b": (b, 3)}], f)`` is ``[f(a), {"b": (f(b), 3)}]``.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) is dict:
        return {key: map_tensors(one, function) for key, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(one, function) for one in value)
    return value


def checksums(parts: Sequence[Any], shapes: bool = True) -> tuple[int, int]:
    """Of the data types in the parts of a step, and of all that a buffer for each tensor would be made by.

    A mask is left out of the first, since it may be there or not where all else is alike.

    Args:
        parts: of a step.
        shapes: count in the second; without them it says how many tensors of which data types there are.
    """
    kinds: set[str] = set()
    described: list[str] = []

    def describe(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.bool:
            kinds.add(str(tensor.dtype))
        described.append(f"{tensor.dtype} {tuple(tensor.shape) if shapes else ''}")
        return tensor

    for part in parts:
        map_tensors(part, describe)
        described.append("/")
    return zlib.crc32(" ".join(sorted(kinds)).encode()), zlib.crc32(" ".join(described).encode())


def most_bytes(parts: Sequence[Any]) -> int:
    """How large a parcel to take of another replica that draws what this one has drawn."""
    sizes: list[int] = []

    def measure(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    for part in parts:
        map_tensors(part, measure)
    return max(_TIMES * sum(sizes), _FREE_BYTES)


def to_bytes(parts: Sequence[Any]) -> torch.Tensor:
    """uint8 [N], for ``from_bytes``."""
    return pack(_placed(parts))


def too_much_text(parts: Sequence[Any]) -> bool:
    """Whether ``from_bytes`` would not take what ``to_bytes`` makes."""
    return text_bytes(_placed(parts)) > packed.MOST_TEXT


def _placed(parts: Sequence[Any]) -> list[Any]:
    """The parts, and of each tensor whether it is on an accelerator."""
    on_device: list[bool] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        on_device.append(tensor.device.type != "cpu")
        return tensor

    for part in parts:
        map_tensors(part, note)
    return [list(parts), on_device]


def from_bytes(file_N: torch.Tensor, device: torch.device) -> list[Any]:
    """The parts again; what was on an accelerator is on ``device``.

    Raises:
        Exception: any, where it is something else.
    """
    parts, on_device = unpack(file_N)
    places = iter(on_device)
    return [map_tensors(part, lambda tensor: tensor.to(device) if next(places) else tensor) for part in parts]
