"""Quantiles of a step's sketches along random unit directions, the raw material of sliced Wasserstein.

    projected_ip = sketch_ip sqrt(K / D)                 the first 16 dimensions of a sketch: unit directions
    quantile_pq  = the ((q + 1/2) / Q)-quantile of column p of projected (nearest rank), Q = 32

The distance to the baseline, the mean over directions and quantiles of the difference of quantiles, is one of the
four of ``baseline_distances``. Sliced Wasserstein distance: Rabin et al. 2011; used on pipeline messages by
arXiv 2603.03592.
"""

from __future__ import annotations

import torch

from deepspeed_sentinel.kernels.dispatch import LAUNCH, runs_on_triton, tl, triton
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS, TOKENS

DIRECTIONS, QUANTILES = 16, 32
SHAPE = {"P": 4, "Q": QUANTILES, "BM": TOKENS}  # directions of a program, quantiles, tokens


def sliced_wasserstein(sketch_MmK: torch.Tensor, hidden: int) -> torch.Tensor:
    """Projected quantiles of M messages.

    Args:
        sketch_MmK: float32, finite, sketches with one projection for all, 1 <= m <= 256, any strides.
        hidden: D of the messages.

    Returns:
        float32 [M, DIRECTIONS * QUANTILES], in the unit of the messages' elements.

    Raises:
        ValueError: ``sketch_MmK`` has another shape or dtype.
    """
    if sketch_MmK.dim() != 3 or not 1 <= sketch_MmK.shape[1] <= TOKENS or sketch_MmK.shape[2] != DIMENSIONS:
        raise ValueError(f"sketch_MmK must be [M, 1 to {TOKENS} tokens, {DIMENSIONS}], got {list(sketch_MmK.shape)}")
    if sketch_MmK.dtype != torch.float32:
        raise ValueError(f"sketch_MmK must be float32, got {sketch_MmK.dtype}")
    if not runs_on_triton(sketch_MmK):
        return sliced_wasserstein_reference(sketch_MmK, hidden)
    messages, tokens, _ = sketch_MmK.shape
    quantiles_MQ = torch.empty(messages, DIRECTIONS * QUANTILES, dtype=torch.float32, device=sketch_MmK.device)
    _quantiles_kernel[(messages, DIRECTIONS // SHAPE["P"])](
        sketch_MmK,
        quantiles_MQ,
        tokens,
        *sketch_MmK.stride(),
        _unit(hidden),
        num_warps=4,
        **SHAPE,
        **LAUNCH,
    )
    return quantiles_MQ


@triton.jit(do_not_specialize=["tokens"])
def _quantiles_kernel(
    sketch_ptr,
    quantiles_ptr,
    tokens,
    stride_M,
    stride_m,
    stride_k,
    unit,
    P: tl.constexpr,
    Q: tl.constexpr,
    BM: tl.constexpr,
):
    """P directions of one message: sort its projected tokens and pick the nearest ranks."""
    message, direction = tl.program_id(0), tl.program_id(1) * P
    p, i, q = direction + tl.arange(0, P), tl.arange(0, BM), tl.arange(0, Q)
    places = message.to(tl.int64) * stride_M + i[None, :] * stride_m + p[:, None] * stride_k
    inside = tl.broadcast_to((i < tokens)[None, :], [P, BM])
    ordered = tl.sort(tl.load(sketch_ptr + places, mask=inside, other=float("inf")))
    ranks = (2 * q + 1) * tokens // (2 * Q)
    picked = tl.gather(ordered, tl.broadcast_to(ranks[None, :], [P, Q]), 1)
    directions = tl.num_programs(1) * P
    tl.store(quantiles_ptr + (message * directions + p[:, None]) * Q + q[None, :], picked * unit)


def _unit(hidden: int) -> float:
    """What turns a sketch's dimensions into projections on unit directions."""
    return (DIMENSIONS / hidden) ** 0.5


def sliced_wasserstein_reference(sketch_XmK: torch.Tensor, hidden: int) -> torch.Tensor:
    """The definition, for sketches [..., m, K]; returns float32 [..., DIRECTIONS * QUANTILES]."""
    tokens = sketch_XmK.shape[-2]
    sorted_XPm = sketch_XmK[..., :DIRECTIONS].transpose(-1, -2).contiguous().sort(dim=-1).values
    ranks_Q = (2 * torch.arange(QUANTILES, device=sketch_XmK.device) + 1) * tokens // (2 * QUANTILES)
    return sorted_XPm.index_select(-1, ranks_Q).flatten(-2) * _unit(hidden)
