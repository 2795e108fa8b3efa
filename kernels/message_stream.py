"""The one read of a message on a GPU: partial results, and how they are added up.

A program reads a strip of columns of a group of tokens: 16 bytes a thread and token, eight
tokens at once, so 128 bytes a thread are in flight. A thread keeps its columns to itself: sums of a strip are additions
in registers, and threads meet once, at the end. An element costs about nine instructions (bf16: two to widen it, five
for column sum, energy and magnitude, two multiply-adds for the digest; counted in the machine code for sm_90), which
leaves an H200 below two thirds of its issue rate at full memory bandwidth. What a keyed digest adds was
not counted. Non-finite elements cost nothing as long as there are none: they make the energy non-finite, and only then
does a program read its part again, masked. Programs number about a thousand by the message's size alone, whatever the
GPU, so sums have the same bits on all of them. What they leave is added up by a second launch, or by a sketch's one in
``observe_message``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from deepspeed_sentinel.kernels.dispatch import KINDS, LAUNCH, integer_view, tl, triton
from deepspeed_sentinel.kernels.hashing import float_of_bits
from deepspeed_sentinel.kernels.keyed_digest import (
    GROUP,
    DigestKey,
    add_columns,
    add_rows,
    group_weight,
    row_weights,
)
from deepspeed_sentinel.kernels.tensor_digest import odd_weights, spread

REDUCED = 128  # columns that one reducing program adds up
_WARPS, _LANE_BYTES = 4, 16
_LEAST_ROWS, _PROGRAMS = 32, 1024


class StreamPlan(NamedTuple):
    """The launch shape of the streaming pass, from the message's size alone, and its scratch memory."""

    strips: int  # of BD columns
    groups: int  # of rows
    rows: int  # a group
    columns: int  # BD
    hidden: int
    floats: torch.Tensor  # [groups, D] column sums, then energies and largest magnitudes, one a program
    words: torch.Tensor  # the same memory as integers: at its end counts, digests and halves of keyed ones

    @property
    def programs(self) -> int:
        return self.strips * self.groups

    @property
    def reducers(self) -> int:
        return -(-self.hidden // REDUCED) + 1


def plan_stream(x_TD: torch.Tensor) -> StreamPlan:
    tokens, hidden = x_TD.shape
    columns = _LANE_BYTES * _WARPS * 32 // x_TD.element_size()
    strips = max(1, -(-hidden // columns))
    rows = max(_LEAST_ROWS, 1 << max(0, tokens * strips // _PROGRAMS - 1).bit_length())
    groups = max(1, -(-tokens // rows))
    floats = torch.empty(groups * hidden + 7 * strips * groups, dtype=torch.float32, device=x_TD.device)
    return StreamPlan(strips, groups, rows, columns, hidden, floats, floats.view(torch.int32))


def launch_stream(x_TD: torch.Tensor, plan: StreamPlan, copy_TD: torch.Tensor | None, key: DigestKey | None) -> None:
    """The one read of a message: partial results of each program into ``plan.floats``."""
    bits_TD = integer_view(x_TD.detach())
    copy_bits_TD = bits_TD if copy_TD is None else integer_view(copy_TD)
    tokens, hidden = x_TD.shape
    _stream_kernel[(plan.strips, plan.groups)](
        bits_TD,
        copy_bits_TD,
        key.seed_1 if key else None,
        plan.floats,
        plan.words,
        tokens,
        hidden,
        *bits_TD.stride(),
        *copy_bits_TD.stride(),
        plan.rows,
        KIND=KINDS[x_TD.dtype],
        COPY=copy_TD is not None,
        KEYED=key is not None,
        FULL=hidden > 0 and hidden % plan.columns == 0,
        BT=GROUP,
        BD=plan.columns,
        num_warps=_WARPS,
        **LAUNCH,
    )


# The number of tokens is a number like any other, so that messages of all lengths share one compilation.
@triton.jit(do_not_specialize=["tokens", "rows"], do_not_specialize_on_alignment=["key_ptr"])
def _stream_kernel(
    x_ptr,
    copy_ptr,
    key_ptr,
    floats_ptr,
    words_ptr,
    tokens,
    hidden,
    stride_t,
    stride_d,
    copy_stride_t,
    copy_stride_d,
    rows,
    KIND: tl.constexpr,
    COPY: tl.constexpr,
    KEYED: tl.constexpr,
    FULL: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    strip, group = tl.program_id(0), tl.program_id(1)
    first = group.to(tl.int64) * rows
    end = tl.minimum(first + rows, tokens)
    r = tl.arange(0, BT)
    columns = strip * BD + tl.arange(0, BD)
    offsets = r.to(tl.int64)[:, None] * stride_t + columns.to(tl.int64)[None, :] * stride_d
    copy_offsets = r.to(tl.int64)[:, None] * copy_stride_t + columns.to(tl.int64)[None, :] * copy_stride_d
    q0, q1 = odd_weights(r, 0xDAA66D2B)

    sums = tl.zeros([BD], tl.float32)
    squares = tl.zeros([BD], tl.float32)
    largest = tl.zeros([BD], tl.float32)
    word0 = tl.zeros([BD], tl.int32)
    word1 = tl.zeros([BD], tl.int32)
    WIDE: tl.constexpr = KIND == "fp32"
    low = tl.zeros([BD], tl.int64)
    high = tl.zeros([BD], tl.int64)
    seed = tl.load(key_ptr) if KEYED else 0
    q = row_weights(seed, r) if KEYED else r
    masked = first
    if FULL:
        masked = end - (end - first) % BT
        for t in range(first, masked, BT):
            bits = tl.load(x_ptr + t * stride_t + offsets)
            if COPY:
                tl.store(copy_ptr + t * copy_stride_t + copy_offsets, bits)
            sums, squares, largest, word0, word1 = _add(bits, t, q0, q1, sums, squares, largest, word0, word1, KIND, BT)
            if KEYED:
                low, high = add_rows(bits.to(tl.int32), q, group_weight(seed, t // BT), low, high, WIDE)
    for t in range(masked, end, BT):
        inside = (t + r < end)[:, None] & (columns < hidden)[None, :]
        bits = tl.load(x_ptr + t * stride_t + offsets, mask=inside, other=0)
        if COPY:
            tl.store(copy_ptr + t * copy_stride_t + copy_offsets, bits, mask=inside)
        sums, squares, largest, word0, word1 = _add(bits, t, q0, q1, sums, squares, largest, word0, word1, KIND, BT)
        if KEYED:
            low, high = add_rows(bits.to(tl.int32), q, group_weight(seed, t // BT), low, high, WIDE)

    energy = tl.sum(squares, 0)
    non_finite = 0
    if not energy < float("inf"):  # a non-finite element always shows here, as may an overflow
        sums = tl.zeros([BD], tl.float32)
        squares = tl.zeros([BD], tl.float32)
        largest = tl.zeros([BD], tl.float32)
        counts = tl.zeros([BD], tl.int32)
        for t in range(first, end, BT):
            inside = (t + r < end)[:, None] & (columns < hidden)[None, :]
            x = float_of_bits(tl.load(x_ptr + t * stride_t + offsets, mask=inside, other=0), KIND)
            finite = tl.abs(x) < float("inf")
            x = tl.where(finite, x, 0.0)
            counts += tl.sum((~finite).to(tl.int32), 0)
            sums += tl.sum(x, 0)
            squares += tl.sum(x * x, 0)
            largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
        energy = tl.sum(squares, 0)
        non_finite = tl.sum(counts, 0)

    w0, w1 = odd_weights(columns, 0x9E3779B9)
    tl.store(floats_ptr + group * hidden + columns, sums, mask=columns < hidden)
    programs = tl.num_programs(0) * tl.num_programs(1)
    place = tl.num_programs(1) * hidden + group * tl.num_programs(0) + strip
    tl.store(floats_ptr + place, energy)
    tl.store(floats_ptr + place + programs, tl.max(largest, 0))
    tl.store(words_ptr + place + 2 * programs, non_finite)
    tl.store(words_ptr + place + 3 * programs, tl.sum(word0 * w0, 0))
    tl.store(words_ptr + place + 4 * programs, tl.sum(word1 * w1, 0))
    if KEYED:
        keyed = add_columns(seed, columns, low, high, WIDE)
        tl.store(words_ptr + place + 5 * programs, keyed.to(tl.int32))
        tl.store(words_ptr + place + 6 * programs, (keyed >> 32).to(tl.int32))


@triton.jit
def _add(bits, t, q0, q1, sums, squares, largest, word0, word1, KIND: tl.constexpr, BT: tl.constexpr):
    """BT rows of a strip more."""
    p0, p1 = odd_weights(t // BT, 0x3C6EF372)
    wide = spread(bits.to(tl.int32))
    word0 += p0 * tl.sum(wide * q0[:, None], 0)
    word1 += p1 * tl.sum(wide * q1[:, None], 0)
    x = float_of_bits(bits, KIND)
    sums += tl.sum(x, 0)
    squares += tl.sum(x * x, 0)
    largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    return sums, squares, largest, word0, word1


@triton.jit
def reduce_partials(
    reducer,
    floats_ptr,
    words_ptr,
    sums_ptr,
    scalars_ptr,
    digest_ptr,
    keyed_ptr,
    hidden,
    groups,
    programs,
    KEYED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up what the streaming programs left: one reducer a block of columns, and the last one for the scalars."""
    if reducer < tl.cdiv(hidden, BLOCK):
        GROUPS: tl.constexpr = 16
        columns = reducer * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([GROUPS, BLOCK], tl.float32)
        for first in range(0, groups, GROUPS):
            g = first + tl.arange(0, GROUPS)
            inside = (g < groups)[:, None] & (columns < hidden)[None, :]
            total += tl.load(floats_ptr + g[:, None] * hidden + columns[None, :], mask=inside, other=0.0)
        tl.store(sums_ptr + columns, tl.sum(total, 0), mask=columns < hidden)
    else:
        PROGRAMS: tl.constexpr = 1024
        energy = tl.zeros([PROGRAMS], tl.float32)
        largest = tl.zeros([PROGRAMS], tl.float32)
        non_finite = tl.zeros([PROGRAMS], tl.int64)
        word0 = tl.zeros([PROGRAMS], tl.int32)
        word1 = tl.zeros([PROGRAMS], tl.int32)
        keyed = tl.zeros([PROGRAMS], tl.int64)
        start = groups * hidden
        for first in range(0, programs, PROGRAMS):
            p = first + tl.arange(0, PROGRAMS)
            inside = p < programs
            energy += tl.load(floats_ptr + start + p, mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.load(floats_ptr + start + programs + p, mask=inside, other=0.0))
            non_finite += tl.load(words_ptr + start + 2 * programs + p, mask=inside, other=0)
            word0 += tl.load(words_ptr + start + 3 * programs + p, mask=inside, other=0)
            word1 += tl.load(words_ptr + start + 4 * programs + p, mask=inside, other=0)
            if KEYED:
                low = tl.load(words_ptr + start + 5 * programs + p, mask=inside, other=0).to(tl.uint32, bitcast=True)
                high = tl.load(words_ptr + start + 6 * programs + p, mask=inside, other=0)
                keyed += (high.to(tl.int64) << 32) + low.to(tl.int64)
        tl.store(scalars_ptr, tl.sum(energy, 0))
        tl.store(scalars_ptr + 1, tl.max(largest, 0))
        tl.store(scalars_ptr + 2, tl.sum(non_finite, 0).to(tl.float32))
        tl.store(digest_ptr, tl.sum(word0, 0))
        tl.store(digest_ptr + 1, tl.sum(word1, 0))
        if KEYED:
            tl.store(keyed_ptr, tl.sum(keyed, 0))
