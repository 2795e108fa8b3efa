"""Sketch of a message X[T, D]: sampled tokens, randomly projected to K = 64 dimensions, and their full norms.

    m        = min(256, T)
    row_i    = ((i 2^24 + u_i) T >> 24) div m          i < m; u_i: 24 bits of hash(sample seed, i)
    sketch_i = F[row_i] R                              F: X with non-finite elements replaced by zero
    norm_i   = |F[row_i]|                              without over- or underflow of the squares
    R_dj     = s_d H[d mod 64, j] r_cj / 8             c = d div 64;  H: Hadamard matrix, (-1)^popcount(i & j)
    s_d, r_cj: random signs, bit 0 of hash(projection seed, d) and bit 1 of hash(projection seed, 64 c + j)

Row i falls uniformly into the i-th of m equal parts of the message, so the sample is stratified; with m = T it is
every token once. Every R_dj is +-1/sqrt(K). Columns of R are those of a block-wise randomised Hadamard transform
(Ailon and Chazelle 2009): two coordinates of one block of 64 meet orthogonal signs, two of different blocks
independent ones. So inner products of sketches are unbiased and their variance is at most that of independent signs
(Achlioptas 2003), for six additions an element instead of 64. One hash a coordinate gives all signs, the same bits
everywhere.

Sketches are finite: an overflowing sum or norm is replaced by float32's largest, an undefined one by zero.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from deepspeed_sentinel.kernels.dispatch import KINDS, LAUNCH, check_output, integer_view, runs_on_triton, tl, triton
from deepspeed_sentinel.kernels.hashing import (
    SAMPLE_STREAM,
    SIGN_STREAM,
    float_of_bits,
    hash_counters,
    hash_reference,
    seed_keys,
)

TOKENS, DIMENSIONS = 256, 64
_LARGEST = torch.finfo(torch.float32).max
SHAPE = {"BM": 2, "BLOCKS": 8, "K": DIMENSIONS}  # tokens of a program, and blocks of K columns that it reads at once


def sketch_rows(tokens: int) -> int:
    """m, the number of tokens that the sketch of a message of so many tokens holds."""
    return min(TOKENS, tokens)


def token_sketch(x_TD: torch.Tensor, seeds_J2: torch.Tensor, sketch_JmK: torch.Tensor, norms_Jm: torch.Tensor) -> None:
    """Write J sketches of one message, each with its own sample and projection, in one launch.

    Args:
        x_TD: floating-point message, T tokens by D hidden, any strides, T >= 1; not changed.
        seeds_J2: int64, on the message's device: sample seed and projection seed of each job.
        sketch_JmK: float32, m = min(256, T), K = 64, out.
        norms_Jm: float32, out.

    Raises:
        ValueError: an argument has another shape, dtype or device.
    """
    check_sketch(x_TD, seeds_J2, sketch_JmK, norms_Jm)
    if runs_on_triton(x_TD):
        launch = sketch_arguments(x_TD, seeds_J2, sketch_JmK, norms_Jm)
        _sketch_kernel[(sketch_programs(x_TD, seeds_J2),)](
            *launch, KIND=KINDS[x_TD.dtype], **SHAPE, num_warps=4, **LAUNCH
        )
        return
    sketch, norms = token_sketch_reference(x_TD.detach(), seeds_J2)
    sketch_JmK.copy_(sketch)
    norms_Jm.copy_(norms)


def check_sketch(x_TD: torch.Tensor, seeds_J2: torch.Tensor, sketch_JmK: torch.Tensor, norms_Jm: torch.Tensor) -> None:
    if x_TD.dim() != 2 or not x_TD.is_floating_point() or x_TD.shape[0] == 0:
        raise ValueError(f"x_TD must be a floating-point [T >= 1, D] tensor, got {x_TD.dtype} {list(x_TD.shape)}")
    jobs, rows = seeds_J2.shape[0] if seeds_J2.dim() else 0, sketch_rows(x_TD.shape[0])
    check_output("seeds_J2", seeds_J2, torch.int64, (jobs, 2), x_TD)
    check_output("sketch_JmK", sketch_JmK, torch.float32, (jobs, rows, DIMENSIONS), x_TD)
    check_output("norms_Jm", norms_Jm, torch.float32, (jobs, rows), x_TD)


def sketch_programs(x_TD: torch.Tensor, seeds_J2: torch.Tensor) -> int:
    return seeds_J2.shape[0] * -(-sketch_rows(x_TD.shape[0]) // SHAPE["BM"])


def sketch_arguments(
    x_TD: torch.Tensor, seeds_J2: torch.Tensor, sketch_JmK: torch.Tensor, norms_Jm: torch.Tensor
) -> tuple[Any, ...]:
    """Of ``sketch_some_rows``, but for its first and its compile-time ones."""
    bits_TD = integer_view(x_TD.detach())
    seeds_J2 = seeds_J2.contiguous()
    sizes = (*x_TD.shape, sketch_rows(x_TD.shape[0]))
    return bits_TD, seeds_J2, sketch_JmK, norms_Jm, *sizes, *bits_TD.stride(), *sketch_JmK.stride(), *norms_Jm.stride()


@triton.jit
def _hadamard_step(x, N: tl.constexpr, K: tl.constexpr):
    """[N, K] -> [N, K]: combine pairs that differ in the lowest bit of the column, and make it the highest one."""
    low, high = tl.split(tl.reshape(x, [N, K // 2, 2]))
    return tl.reshape(tl.permute(tl.join(low + high, low - high), [0, 2, 1]), [N, K])


@triton.jit
def sketch_some_rows(
    program,
    x_ptr,
    seeds_ptr,
    sketch_ptr,
    norms_ptr,
    tokens,
    hidden,
    rows,
    stride_t,
    stride_d,
    sketch_j,
    sketch_m,
    sketch_k,
    norms_j,
    norms_m,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BLOCKS: tl.constexpr,
    K: tl.constexpr,
):
    """BM tokens of one job's sample. Once round a loop: BLOCKS blocks of K columns, transformed block by block."""
    LARGEST: tl.constexpr = 3.4028234663852886e38
    programs_a_job = tl.cdiv(rows, BM)
    job = program // programs_a_job
    i = program % programs_a_job * BM + tl.arange(0, BM)
    sample0, sample1 = seed_keys(tl.load(seeds_ptr + 2 * job), 0x9E3779B9)
    sign0, sign1 = seed_keys(tl.load(seeds_ptr + 2 * job + 1), 0x3C6EF372)
    u24 = (hash_counters(i, sample0, sample1) & 0xFFFFFF).to(tl.int64)
    row = (((i.to(tl.int64) << 24) + u24) * tokens >> 24) // rows

    # Squares of the elements, of the elements enlarged and diminished: one of the three neither over- nor underflows.
    squares = tl.zeros([BM, BLOCKS * K], tl.float32)
    squares_of_small = tl.zeros([BM, BLOCKS * K], tl.float32)
    squares_of_large = tl.zeros([BM, BLOCKS * K], tl.float32)
    total = tl.zeros([BM, BLOCKS, K], tl.float32)
    for first in range(0, hidden, BLOCKS * K):
        d = first + tl.arange(0, BLOCKS * K)
        hashes = hash_counters(d, sign0, sign1)
        inside = (i < rows)[:, None] & (d < hidden)[None, :]
        offsets = row[:, None] * stride_t + d.to(tl.int64)[None, :] * stride_d
        x = float_of_bits(tl.load(x_ptr + offsets, mask=inside, other=0), KIND)
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        small, large = x * 2.0**100, x * 2.0**-80
        squares += x * x
        squares_of_small += small * small
        squares_of_large += large * large
        y = tl.reshape(tl.where((hashes & 1)[None, :] != 0, -x, x), [BM * BLOCKS, K])
        for _ in tl.static_range(6):
            y = _hadamard_step(y, BM * BLOCKS, K)
        block_signs = tl.reshape(tl.where((hashes & 2) != 0, -0.125, 0.125), [1, BLOCKS, K])
        total += tl.reshape(y, [BM, BLOCKS, K]) * block_signs

    sketch = tl.sum(total, 1)
    sketch = tl.where(sketch == sketch, tl.minimum(tl.maximum(sketch, -LARGEST), LARGEST), 0.0)
    k = tl.arange(0, K)
    places = job * sketch_j + i[:, None] * sketch_m + k[None, :] * sketch_k
    tl.store(sketch_ptr + places, sketch, mask=(i < rows)[:, None])
    norms = tl.sqrt_rn(tl.sum(squares, 1))
    norms_of_large = tl.minimum(tl.sqrt_rn(tl.sum(squares_of_large, 1)) * 2.0**80, LARGEST)
    norms_of_small = tl.sqrt_rn(tl.sum(squares_of_small, 1)) * 2.0**-100
    norms = tl.where(norms > 2.0**60, norms_of_large, tl.where(norms < 2.0**-48, norms_of_small, norms))
    tl.store(norms_ptr + job * norms_j + i * norms_m, norms, mask=i < rows)


@triton.jit
def _sketch_kernel(
    x_ptr,
    seeds_ptr,
    sketch_ptr,
    norms_ptr,
    tokens,
    hidden,
    rows,
    stride_t,
    stride_d,
    sketch_j,
    sketch_m,
    sketch_k,
    norms_j,
    norms_m,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BLOCKS: tl.constexpr,
    K: tl.constexpr,
):
    sketch_some_rows(
        tl.program_id(0),
        x_ptr,
        seeds_ptr,
        sketch_ptr,
        norms_ptr,
        tokens,
        hidden,
        rows,
        stride_t,
        stride_d,
        sketch_j,
        sketch_m,
        sketch_k,
        norms_j,
        norms_m,
        KIND,
        BM,
        BLOCKS,
        K,
    )


def token_sketch_reference(x_XTD: torch.Tensor, seeds_XJ2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, for one message [T, D] or many [..., T, D] at once.

    Args:
        x_XTD: messages.
        seeds_XJ2: int64 [J, 2] for all messages, or [..., J, 2] with seeds of their own.

    Returns:
        sketches float32 [..., J, m, K] and norms float32 [..., J, m].
    """
    tokens, hidden = x_XTD.shape[-2:]
    x_XJTD = x_XTD[..., None, :, :]
    if tokens <= TOKENS:
        rows_XJmD = x_XJTD.float()
        rows_XJmD = rows_XJmD.expand(*rows_XJmD.shape[:-3], seeds_XJ2.shape[-2], tokens, hidden)
    elif seeds_XJ2.dim() == 2:
        index_Jm = sampled_rows(tokens, seeds_XJ2[:, 0])
        rows_XJmD = x_XTD.index_select(-2, index_Jm.flatten()).unflatten(-2, index_Jm.shape).float()
    else:
        index_XJm1 = sampled_rows(tokens, seeds_XJ2[..., 0])[..., None]
        rows_XJmD = torch.take_along_dim(x_XJTD, index_XJm1, dim=-2).float()
    rows_XJmD = rows_XJmD.nan_to_num(0.0, 0.0, 0.0)
    sketch_XJmK = (rows_XJmD @ projection(hidden, seeds_XJ2[..., 1])).nan_to_num(0.0, _LARGEST, -_LARGEST)
    return sketch_XJmK, _norms(rows_XJmD)


def sketch_of_rows(rows_XmD: torch.Tensor, seeds_XJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``token_sketch_reference`` makes of tokens that were sampled already, in J projections of the same tokens.

    Args:
        rows_XmD: the sampled tokens.
        seeds_XJ: int64, of the projections.

    Returns:
        sketches float32 [..., J, m, K] and norms float32 [..., m].
    """
    rows_XmD = rows_XmD.float().nan_to_num(0.0, 0.0, 0.0)
    # One product for all projections, and no copy of the rows for each.
    matrix_XDN = projection(rows_XmD.shape[-1], seeds_XJ).movedim(-3, -2).flatten(-2)
    sketch_XmN = (rows_XmD @ matrix_XDN).nan_to_num(0.0, _LARGEST, -_LARGEST)
    return sketch_XmN.unflatten(-1, (-1, DIMENSIONS)).movedim(-2, -3), _norms(rows_XmD)


def _norms(rows_XD: torch.Tensor) -> torch.Tensor:
    norms_X = torch.linalg.vector_norm(rows_XD, dim=-1)
    # On a CPU looking at a value costs nothing; elsewhere it would wait for the device.
    if rows_XD.device.type == "cpu" and bool(((norms_X >= 2.0**-48) & (norms_X <= 2.0**60)).all()):
        return norms_X
    scales_X1 = rows_XD.abs().amax(-1, keepdim=True)
    scales_X1 = torch.where(scales_X1 > 0, scales_X1, 1.0)
    return (torch.linalg.vector_norm(rows_XD / scales_X1, dim=-1) * scales_X1[..., 0]).clamp_max(_LARGEST)


def sampled_rows(tokens: int, seeds_X: torch.Tensor) -> torch.Tensor:
    """int64 seeds [...] -> int64 [..., m], ascending: which tokens of a message are sketched."""
    rows = sketch_rows(tokens)
    u24_Xm = hash_reference(seeds_X, SAMPLE_STREAM, rows) & 0xFFFFFF
    i_m = torch.arange(rows, dtype=torch.int64, device=seeds_X.device)
    return (((i_m << 24) + u24_Xm) * tokens >> 24) // rows


def projection(hidden: int, seeds_X: torch.Tensor) -> torch.Tensor:
    """int64 seeds [...] -> float32 [..., hidden, K], entries +-1/8. On a CPU the latest ones are kept."""
    if seeds_X.device.type == "cpu":
        return _kept_projection(hidden, tuple(seeds_X.flatten().tolist())).unflatten(0, (*seeds_X.shape, 1)).squeeze(-3)
    return _projection(hidden, seeds_X)


@lru_cache(maxsize=16)
def _kept_projection(hidden: int, seeds: tuple[int, ...]) -> torch.Tensor:
    return _projection(hidden, torch.tensor(seeds, dtype=torch.int64))


def _projection(hidden: int, seeds_X: torch.Tensor) -> torch.Tensor:
    blocks = -(-hidden // DIMENSIONS)
    hashes_XCK = hash_reference(seeds_X, SIGN_STREAM, blocks * DIMENSIONS).unflatten(-1, (blocks, DIMENSIONS))
    sign_XCK, block_sign_XCK = (1.0 - 2.0 * (hashes_XCK >> bit & 1).float() for bit in (0, 1))
    hadamard_KK = _hadamard(seeds_X.device) / DIMENSIONS**0.5
    return (sign_XCK[..., :, None] * hadamard_KK * block_sign_XCK[..., None, :]).flatten(-3, -2)[..., :hidden, :]


@lru_cache(maxsize=8)
def _hadamard(device: torch.device) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < DIMENSIONS:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device)
