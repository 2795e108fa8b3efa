"""Nested values as bytes and back, for what one rank hands another.

A JSON text says what there is, and the bits of all tensors follow it. Nothing is unpickled, and a tensor takes no more
memory than the bytes that came for it. Text unfolds to some thirty times its size, so there may be ``MOST_TEXT`` of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from deepspeed_sentinel.evidence.statement import raw

PLAIN = (bool, int, float, str, type(None))
# of whole bytes, so that bits can be read as they lie
TYPES = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}
MOST_TEXT = 1 << 24  # bytes
_HEAD = 8  # bytes that say how long the text is
_MOST_DEPTH = 100  # who reads it may stand deeper in calls than who wrote it
_MOST_AXES, _MOST_DIGITS = 64, 4000  # torch's, and what Python reads of a whole number


def has_bits(tensor: torch.Tensor) -> bool:
    """Whether its bits can be read as they lie, and are all that it is."""
    dense = tensor.layout == torch.strided and not tensor.is_nested
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return plain and dense and not tensor.is_meta and tensor.dtype in TYPES.values()


def can_be_packed(value: Any, depth: int = _MOST_DEPTH) -> bool:
    """Whether all of it is dense tensors, numbers, text and None in tuples, lists and dicts nested so deep at most."""
    if type(value) in (dict, tuple, list) and not depth:
        return False
    if type(value) is dict:
        return all(type(key) in PLAIN and can_be_packed(one, depth - 1) for key, one in value.items())
    if type(value) in (tuple, list):
        return all(can_be_packed(one, depth - 1) for one in value)
    if type(value) is int:
        return value.bit_length() < 3 * _MOST_DIGITS
    return has_bits(value) if isinstance(value, torch.Tensor) else type(value) in PLAIN


def pack(value: Any) -> torch.Tensor:
    """uint8 [N], for ``unpack``; waits for the device of each tensor.

    Example: of ``(a, {"b": 3})`` with ``a`` float32 [2], the length of the text, the text
    ``["tuple", ["tensor", "float32", [2], []], ["dict", ["b", 3]]]`` and 8 bytes.

    Args:
        value: something that ``can_be_packed``.
    """
    tensors: list[torch.Tensor] = []
    text = _text(value, tensors)
    head = len(text).to_bytes(_HEAD, "little") + text
    return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), *map(raw, tensors)])


def text_bytes(value: Any) -> int:
    """How much text ``pack`` makes of it; more than ``MOST_TEXT`` is taken by nobody."""
    return len(_text(value, []))


def unpack(file_N: torch.Tensor) -> Any:
    """What was packed, its tensors on the CPU.

    Raises:
        ValueError: this is nothing that ``pack`` gives.
    """
    size = int.from_bytes(file_N[:_HEAD].numpy().tobytes(), "little")
    if size > MOST_TEXT:
        raise ValueError(f"{size} bytes of text announced, at most {MOST_TEXT} are taken")
    text, bits = file_N[_HEAD : _HEAD + size], _Bits(file_N[_HEAD + size :])
    try:
        value = _read(json.loads(text.numpy().tobytes()), bits)
    except (TypeError, LookupError, RuntimeError) as error:
        raise ValueError(f"{file_N.numel()} bytes are no packed value: {error}") from error
    if bits.left:
        raise ValueError(f"{bits.left} bytes belong to no tensor of a packed value")
    return value


def strides_of(tensor: torch.Tensor) -> list[int]:
    """Of a dense tensor that is not packed in the order of its axes, on which the last bits of a product may depend."""
    strides = list(tensor.stride())
    return strides if not tensor.is_contiguous() and _is_dense(tensor.shape, strides) else []


def tensor_of(bits_N: torch.Tensor, dtype: str, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """The tensor that ``raw`` gives these bits of, on the CPU.

    Args:
        bits_N: uint8 [N].
        dtype: one of ``TYPES``.
        shape, strides: whole numbers; the latter as of ``strides_of``.

    Raises:
        ValueError: they are of no such tensor.
    """
    if _size(dtype, shape) != bits_N.numel() or (strides and not (_are_axes(strides) and _is_dense(shape, strides))):
        raise ValueError(f"{bits_N.numel()} bytes are no tensor {dtype} {shape} with strides {strides}")
    kind = TYPES[dtype]
    if not bits_N.numel():
        return torch.empty(shape, dtype=kind)
    whole = bits_N.clone().view(kind).reshape(tuple(shape))
    if not strides:
        return whole
    # As whole numbers: a copy of flags would make 1 of every byte that is not 0.
    integers = torch.uint8 if kind == torch.bool else kind
    return torch.empty_strided(shape, strides, dtype=integers).copy_(whole.view(integers)).view(kind)


class _Bits:
    """What is left of the bytes of tensors."""

    def __init__(self, bits_N: torch.Tensor) -> None:
        self._bits_N = bits_N

    @property
    def left(self) -> int:
        return self._bits_N.numel()

    def take(self, dtype: str, shape: list[int], strides: list[int]) -> torch.Tensor:
        size = _size(dtype, shape)
        if size > self.left:
            raise ValueError(f"a tensor {dtype} {shape} is no part of {self.left} bytes")
        mine_N, self._bits_N = self._bits_N[:size], self._bits_N[size:]
        return tensor_of(mine_N, dtype, shape, strides)


def _text(value: Any, tensors: list[torch.Tensor]) -> bytes:
    return json.dumps(_written(value, tensors), separators=(",", ":")).encode()


def _written(value: Any, tensors: list[torch.Tensor]) -> Any:
    """What JSON has for a value; its tensors are added to a list."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ["tensor", str(value.dtype).removeprefix("torch."), list(value.shape), strides_of(value)]
    if type(value) is dict:
        return ["dict", *([key, _written(one, tensors)] for key, one in value.items())]
    if type(value) in (tuple, list):
        return [type(value).__name__, *(_written(one, tensors) for one in value)]
    return value


def _read(written: Any, bits: _Bits) -> Any:
    if type(written) in PLAIN:
        return written
    if type(written) is not list:
        raise TypeError(f"a {type(written).__name__}")
    kind, *rest = written
    if kind == "tensor":
        return bits.take(*rest)
    if kind == "dict":
        return {key: _read(one, bits) for key, one in rest}
    return {"tuple": tuple, "list": list}[kind](_read(one, bits) for one in rest)


def _are_axes(sizes: object) -> bool:
    """Whether these may be the sizes or the strides of a tensor: they are a stranger's."""
    whole = isinstance(sizes, Sequence) and len(sizes) <= _MOST_AXES
    return whole and all(type(one) is int and 0 <= one < 2**63 for one in sizes)  # type: ignore[attr-defined]


def _size(dtype: str, shape: Sequence[int]) -> int:
    """Of such a tensor in bytes. Raises ValueError where there is none."""
    if dtype not in TYPES or not _are_axes(shape):
        raise ValueError(f"no tensor has the type {dtype!r:.40} and the shape {shape!r:.200}")
    return math.prod(shape) * TYPES[dtype].itemsize


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor's elements lie without gaps and without sharing memory."""
    step = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if stride != step:
            return False
        step *= size
    return step > 0
