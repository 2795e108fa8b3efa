"""One pass over a message X[T, D]: column sums, energy, largest magnitude, non-finite count, digest.

With F the finite part of X (non-finite elements replaced by zero):

    column_sums_d = sum_t F_td            energy = sum_td F_td^2
    max_abs       = max_td |F_td|         non_finite = number of NaN and infinite elements
    digest_j      = sum_td V_jt B_td W_jd  (mod 2^32)      j = 0, 1;  B: the bits of X as integers
    V_jt          = P_j(t div 8) Q_j(t mod 8);             P, Q, W: fixed odd weights

The digest is a sum modulo 2^32, so its bits depend on neither the order of the additions nor the device, and since
the weights are odd no single changed bit is lost. Equal digests at both ends of a link mean equal messages, bit for
bit, up to a chance of about 2^-64.

Statistics after arXiv 2603.03592; the digest is ours.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from deepspeed_sentinel.kernels.dispatch import (
    KINDS,
    LAUNCH,
    check_contiguous,
    check_output,
    integer_view,
    runs_on_triton,
    tl,
    triton,
)
from deepspeed_sentinel.kernels.hashing import float_of_bits, mix, mix_reference

_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
DIGEST_WORDS = 2
SCALARS = ("energy", "max_abs", "non_finite")
GROUP = 8  # rows that share one weight P
REDUCED = 128  # columns that one reducing program adds up
_WARPS, _LANE_BYTES = 4, 16
_LEAST_ROWS, _PROGRAMS = 32, 1024
_COLUMNS, _GROUPS, _ROWS = 0x9E3779B9, 0x3C6EF372, 0xDAA66D2B  # counters of the three kinds of weights start here


def message_statistics(
    x_TD: torch.Tensor,
    column_sums_D: torch.Tensor,
    scalars_3: torch.Tensor,
    digest_2: torch.Tensor,
    copy_TD: torch.Tensor | None = None,
) -> None:
    """Write the statistics of one message into rows of the step's buffers.

    Args:
        x_TD: floating-point message, T tokens by D hidden, any strides; not changed.
        column_sums_D: float32 [D], out.
        scalars_3: float32 [3], out: energy, max_abs, non_finite.
        digest_2: int32 [2], out.
        copy_TD: optional, like ``x_TD``, out: its copy, made while it is read.

    Raises:
        ValueError: ``x_TD`` is not two-dimensional floating point, or an output does not fit it.
    """
    check_statistics(x_TD, column_sums_D, scalars_3, digest_2, copy_TD)
    if runs_on_triton(x_TD):
        plan = plan_stream(x_TD)
        launch_stream(x_TD, plan, copy_TD)
        _reduce_kernel[(plan.reducers,)](
            plan.floats,
            plan.words,
            column_sums_D,
            scalars_3,
            digest_2,
            plan.hidden,
            plan.groups,
            plan.programs,
            BLOCK=REDUCED,
            num_warps=4,
            **LAUNCH,
        )
        return
    for out, value in zip(
        (column_sums_D, scalars_3, digest_2), message_statistics_reference(x_TD.detach()), strict=True
    ):
        out.copy_(value)
    if copy_TD is not None:
        copy_TD.copy_(x_TD)


def check_statistics(
    x_TD: torch.Tensor,
    column_sums_D: torch.Tensor,
    scalars_3: torch.Tensor,
    digest_2: torch.Tensor,
    copy_TD: torch.Tensor | None,
) -> None:
    if x_TD.dim() != 2 or not x_TD.is_floating_point():
        raise ValueError(f"x_TD must be a floating-point [T, D] tensor, got {x_TD.dtype} {list(x_TD.shape)}")
    check_output("column_sums_D", column_sums_D, torch.float32, (x_TD.shape[1],), x_TD)
    check_output("scalars_3", scalars_3, torch.float32, (3,), x_TD)
    check_output("digest_2", digest_2, torch.int32, (DIGEST_WORDS,), x_TD)
    check_contiguous(column_sums_D=column_sums_D, scalars_3=scalars_3, digest_2=digest_2)
    if copy_TD is not None:
        check_output("copy_TD", copy_TD, x_TD.dtype, tuple(x_TD.shape), x_TD)


class StreamPlan(NamedTuple):
    """The launch shape of the streaming pass, from the message's size alone, and its scratch memory."""

    strips: int  # of BD columns
    groups: int  # of rows
    rows: int  # a group
    columns: int  # BD
    hidden: int
    floats: torch.Tensor  # [groups, D] column sums, then energies and largest magnitudes, one a program
    words: torch.Tensor  # the same memory as integers: at its end counts and digests

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
    floats = torch.empty(groups * hidden + 5 * strips * groups, dtype=torch.float32, device=x_TD.device)
    return StreamPlan(strips, groups, rows, columns, hidden, floats, floats.view(torch.int32))


def launch_stream(x_TD: torch.Tensor, plan: StreamPlan, copy_TD: torch.Tensor | None) -> None:
    """The one read of a message: partial results of each program into ``plan.floats``."""
    bits_TD = integer_view(x_TD.detach())
    copy_bits_TD = bits_TD if copy_TD is None else integer_view(copy_TD)
    tokens, hidden = x_TD.shape
    _stream_kernel[(plan.strips, plan.groups)](
        bits_TD,
        copy_bits_TD,
        plan.floats,
        plan.words,
        tokens,
        hidden,
        *bits_TD.stride(),
        *copy_bits_TD.stride(),
        plan.rows,
        KIND=KINDS[x_TD.dtype],
        COPY=copy_TD is not None,
        WHOLE=hidden > 0 and hidden % plan.columns == 0 and tokens % plan.rows == 0,
        BT=GROUP,
        BD=plan.columns,
        num_warps=_WARPS,
        **LAUNCH,
    )


@triton.jit
def _odd_weights(counters, start: tl.constexpr):
    h = mix(tl.cast(counters, tl.uint32) + start)
    second = (h ^ (h >> 15)) * 0x2C1B3C6D
    return (h | 1).to(tl.int32, bitcast=True), (second | 1).to(tl.int32, bitcast=True)


@triton.jit
def _stream_kernel(
    x_ptr,
    copy_ptr,
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
    WHOLE: tl.constexpr,
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
    q0, q1 = _odd_weights(r, 0xDAA66D2B)

    sums = tl.zeros([BD], tl.float32)
    squares = tl.zeros([BD], tl.float32)
    largest = tl.zeros([BD], tl.float32)
    word0 = tl.zeros([BD], tl.int32)
    word1 = tl.zeros([BD], tl.int32)
    for t in range(first, end, BT):
        if WHOLE:
            bits = tl.load(x_ptr + t * stride_t + offsets)
        else:
            inside = (t + r < end)[:, None] & (columns < hidden)[None, :]
            bits = tl.load(x_ptr + t * stride_t + offsets, mask=inside, other=0)
        if COPY:
            if WHOLE:
                tl.store(copy_ptr + t * copy_stride_t + copy_offsets, bits)
            else:
                tl.store(copy_ptr + t * copy_stride_t + copy_offsets, bits, mask=inside)
        p0, p1 = _odd_weights(t // BT, 0x3C6EF372)
        wide = bits.to(tl.int32)
        word0 += p0 * tl.sum(wide * q0[:, None], 0)
        word1 += p1 * tl.sum(wide * q1[:, None], 0)
        x = float_of_bits(bits, KIND)
        sums += tl.sum(x, 0)
        squares += tl.sum(x * x, 0)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))

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

    w0, w1 = _odd_weights(columns, 0x9E3779B9)
    tl.store(floats_ptr + group * hidden + columns, sums, mask=columns < hidden)
    programs = tl.num_programs(0) * tl.num_programs(1)
    place = tl.num_programs(1) * hidden + group * tl.num_programs(0) + strip
    tl.store(floats_ptr + place, energy)
    tl.store(floats_ptr + place + programs, tl.max(largest, 0))
    tl.store(words_ptr + place + 2 * programs, non_finite)
    tl.store(words_ptr + place + 3 * programs, tl.sum(word0 * w0, 0))
    tl.store(words_ptr + place + 4 * programs, tl.sum(word1 * w1, 0))


@triton.jit
def reduce_partials(
    reducer, floats_ptr, words_ptr, sums_ptr, scalars_ptr, digest_ptr, hidden, groups, programs, BLOCK: tl.constexpr
):
    """Add up what the streaming programs left: one reducer a block of columns, and the last one for the scalars."""
    if reducer < tl.cdiv(hidden, BLOCK):
        GROUPS: tl.constexpr = 32
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
        start = groups * hidden
        for first in range(0, programs, PROGRAMS):
            p = first + tl.arange(0, PROGRAMS)
            inside = p < programs
            energy += tl.load(floats_ptr + start + p, mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.load(floats_ptr + start + programs + p, mask=inside, other=0.0))
            non_finite += tl.load(words_ptr + start + 2 * programs + p, mask=inside, other=0)
            word0 += tl.load(words_ptr + start + 3 * programs + p, mask=inside, other=0)
            word1 += tl.load(words_ptr + start + 4 * programs + p, mask=inside, other=0)
        tl.store(scalars_ptr, tl.sum(energy, 0))
        tl.store(scalars_ptr + 1, tl.max(largest, 0))
        tl.store(scalars_ptr + 2, tl.sum(non_finite, 0).to(tl.float32))
        tl.store(digest_ptr, tl.sum(word0, 0))
        tl.store(digest_ptr + 1, tl.sum(word1, 0))


@triton.jit
def _reduce_kernel(
    floats_ptr, words_ptr, sums_ptr, scalars_ptr, digest_ptr, hidden, groups, programs, BLOCK: tl.constexpr
):
    reduce_partials(
        tl.program_id(0), floats_ptr, words_ptr, sums_ptr, scalars_ptr, digest_ptr, hidden, groups, programs, BLOCK
    )


def message_statistics_reference(x_XTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, for one message [T, D] or many [..., T, D] at once.

    Returns:
        column sums float32 [..., D], scalars float32 [..., 3] in the order of ``SCALARS``, digest int32 [..., 2].
    """
    digest_X2 = _digest(x_XTD)
    values_XTD = x_XTD if x_XTD.dtype == torch.float64 else x_XTD.float()
    low_X, high_X = _extremes(values_XTD)
    non_finite_X = torch.zeros_like(low_X)
    # NaN and infinities show in the extremes. On a CPU looking at a value costs nothing; elsewhere it would wait.
    if values_XTD.device.type != "cpu" or not bool(torch.isfinite(high_X - low_X).all()):
        finite_XTD = torch.isfinite(values_XTD)
        non_finite_X = torch.count_nonzero(~finite_XTD, dim=(-2, -1))
        values_XTD = torch.where(finite_XTD, values_XTD, 0)
        low_X, high_X = _extremes(values_XTD)
    sums_XD = values_XTD.sum(-2)
    flat_XE = values_XTD.flatten(-2)
    energy_X = (flat_XE[..., None, :] @ flat_XE[..., None])[..., 0, 0]
    scalars_X3 = torch.stack([energy_X, torch.maximum(-low_X, high_X), non_finite_X], dim=-1)
    return sums_XD.float(), scalars_X3.float() + 0.0, digest_X2  # + 0.0: a largest magnitude of -0.0 is 0.0


def tensor_digest(x: torch.Tensor) -> torch.Tensor:
    """The digest of a tensor of any dtype and shape, int32 [2]; see the head of this file."""
    x = x.detach().to(torch.uint8) if x.dtype == torch.bool else x.detach()
    return _digest(x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1))


def _extremes(values_XTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if values_XTD.shape[-2] * values_XTD.shape[-1] == 0:
        zeros_X = values_XTD.new_zeros(values_XTD.shape[:-2])
        return zeros_X, zeros_X
    if values_XTD.dim() == 2:
        low, high = torch.aminmax(values_XTD)
    else:
        low, high = torch.aminmax(values_XTD.flatten(-2), dim=-1)
    return low, high


def _digest(x_XRC: torch.Tensor) -> torch.Tensor:
    bits_XRC = x_XRC.contiguous().view(_INTEGER_VIEW[x_XRC.element_size()]).to(torch.int32)
    rows, columns = bits_XRC.shape[-2:]
    row_weights_2R, column_weights_2C = digest_weights(rows, columns, bits_XRC.device)
    if bits_XRC.device.type == "cpu":
        by_column_X2C = row_weights_2R @ bits_XRC
    else:  # there is no integer matrix product on a GPU
        by_column_X2C = torch.stack(
            [(bits_XRC * weights_R[:, None]).sum(-2, dtype=torch.int32) for weights_R in row_weights_2R], dim=-2
        )
    return (by_column_X2C * column_weights_2C).sum(-1, dtype=torch.int32)


@lru_cache(maxsize=64)
def digest_weights(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights V int32 [2, rows] and W int32 [2, columns]."""
    group_2G, row_2R = _odd_pair(-(-rows // GROUP), _GROUPS), _odd_pair(GROUP, _ROWS)
    row_weights_2R = (group_2G[:, :, None] * row_2R[:, None, :]).flatten(1)[:, :rows]
    weights = (_signed(row_weights_2R & 0xFFFFFFFF), _signed(_odd_pair(columns, _COLUMNS)))
    return weights[0].contiguous().to(device), weights[1].to(device)


def _odd_pair(count: int, start: int) -> torch.Tensor:
    """int64 [2, count]: two odd 32-bit weights a counter, the second derived from the first one's hash."""
    h = mix_reference(torch.arange(count, dtype=torch.int64) + start & 0xFFFFFFFF)
    return torch.stack([h, (h ^ (h >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF]) | 1


def _signed(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
