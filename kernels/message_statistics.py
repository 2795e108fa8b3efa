"""One pass over a message X[T, D]: column sums, energy, largest magnitude, non-finite count, digest.

With F the finite part of X (non-finite elements replaced by zero):

    column_sums_d = sum_t F_td            energy = sum_td F_td^2
    max_abs       = max_td |F_td|         non_finite = number of NaN and infinite elements
    digest        = of the bits of X, see ``tensor_digest``

How it is done on a GPU. A program reads a strip of columns of a group of tokens: 16 bytes a thread and token, eight
tokens at once, so 128 bytes a thread are in flight. A thread keeps its columns to itself: sums of a strip are additions
in registers, and threads meet once, at the end. An element costs about nine instructions (bf16: two to widen it, five
for column sum, energy and magnitude, two multiply-adds for the digest; counted in the machine code for sm_90), which
leaves an H200 below two thirds of its issue rate at full memory bandwidth. Non-finite elements cost nothing as long
as there are none: they make the energy non-finite, and only then does a program read its part again, masked.
Programs number about a thousand by the message's size alone, whatever the GPU, so sums have the same bits on all of
them. What they leave is added up by a second launch, or by the sketch's launch in ``observe_message``.

Rounding: a sum of float32 additions is off by at most depth * 2^-24 of the sum of magnitudes, where depth is the
longest chain of additions (Higham 2002): on a GPU about 45 + tokens a group / 8, on a CPU at most their number.
A sum beyond float32's range is infinite, or undefined where partial sums of both signs are.

Statistics after arXiv 2603.03592.
"""

from __future__ import annotations

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
from deepspeed_sentinel.kernels.hashing import float_of_bits
from deepspeed_sentinel.kernels.tensor_digest import (
    DIGEST_WORDS,
    GROUP,
    INTEGER_VIEW,
    digest_weights,
    odd_weights,
    weighted_sum,
)

SCALARS = ("energy", "max_abs", "non_finite")
REDUCED = 128  # columns that one reducing program adds up
_WARPS, _LANE_BYTES = 4, 16
_LEAST_ROWS, _PROGRAMS = 32, 1024
_BLOCK = 1 << 18  # elements that the reference takes at once on a CPU


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
    q0, q1 = odd_weights(r, 0xDAA66D2B)

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
        p0, p1 = odd_weights(t // BT, 0x3C6EF372)
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

    w0, w1 = odd_weights(columns, 0x9E3779B9)
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


@triton.jit(do_not_specialize_on_alignment=["sums_ptr", "scalars_ptr", "digest_ptr"])  # rows of buffers: any alignment
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
    if x_XTD.dim() == 2 and x_XTD.device.type == "cpu" and x_XTD.numel() > _BLOCK:
        return _by_blocks(x_XTD)
    bits_XTC, values_XTD = _bits_and_values(x_XTD)
    digest_X2 = weighted_sum(bits_XTC, *digest_weights(*bits_XTC.shape[-2:], x_XTD.device))
    return *_sums_and_scalars(values_XTD), digest_X2


def _by_blocks(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for one message on a CPU, in blocks of tokens whose intermediate values stay in its cache."""
    tokens, hidden = x_TD.shape
    rows = max(GROUP, _BLOCK // hidden)
    parts = []
    for first in range(0, tokens, rows):
        bits_RC, values_RD = _bits_and_values(x_TD[first : first + rows])
        row_weights_2T, column_weights_2C = digest_weights(tokens, bits_RC.shape[1], x_TD.device)
        digest_2 = weighted_sum(bits_RC, row_weights_2T[:, first : first + rows], column_weights_2C)
        parts.append((*_sums_and_scalars(values_RD), digest_2))
    sums_BD, scalars_B3, digest_B2 = (torch.stack(part) for part in zip(*parts, strict=True))
    energy, max_abs, non_finite = scalars_B3.unbind(1)
    scalars_3 = torch.stack([energy.sum(), max_abs.max(), non_finite.sum(dtype=torch.float64).float()])
    return sums_BD.sum(0), scalars_3, digest_B2.sum(0, dtype=torch.int32)


def _bits_and_values(x_XTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [..., T, C], C = D but for float64, and the same numbers in float32 or float64."""
    bits_XTC = x_XTD.contiguous().view(INTEGER_VIEW[x_XTD.element_size()]).to(torch.int32)
    return bits_XTC, x_XTD if x_XTD.dtype == torch.float64 else x_XTD.float()


def _sums_and_scalars(values_XTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low_X, high_X = _extremes(values_XTD)
    non_finite_X = torch.zeros_like(low_X)
    # NaN and infinities show in the extremes. On a CPU looking at a value costs nothing; elsewhere it would wait.
    if values_XTD.device.type != "cpu" or not bool(torch.isfinite(high_X - low_X).all()):
        finite_XTD = torch.isfinite(values_XTD)
        non_finite_X = torch.count_nonzero(~finite_XTD, dim=(-2, -1))
        values_XTD = torch.where(finite_XTD, values_XTD, 0)
        low_X, high_X = _extremes(values_XTD)
    sums_XD = values_XTD.new_ones(values_XTD.shape[-2]) @ values_XTD  # three times as fast as sum(-2) on a CPU
    flat_XE = values_XTD.flatten(-2)
    energy_X = torch.dot(flat_XE, flat_XE) if flat_XE.dim() == 1 else torch.linalg.vecdot(flat_XE, flat_XE)
    scalars_X3 = torch.stack([energy_X, torch.maximum(-low_X, high_X), non_finite_X], dim=-1)
    return sums_XD.float(), scalars_X3.float() + 0.0  # + 0.0: a largest magnitude of -0.0 is 0.0


def _extremes(values_XTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if values_XTD.shape[-2] * values_XTD.shape[-1] == 0:
        zeros_X = values_XTD.new_zeros(values_XTD.shape[:-2])
        return zeros_X, zeros_X
    if values_XTD.dim() == 2:
        low, high = torch.aminmax(values_XTD)
    else:
        low, high = torch.aminmax(values_XTD.flatten(-2), dim=-1)
    return low, high
