"""The four distances of a step's messages to their EMA baseline, and the baseline's update.

With xbar the mean of a message over its tokens, m the baseline of such means, q the message's quantiles along
random unit directions and b the baseline of those quantiles:

    mean_abs           = mean_d |xbar_d - m_d|
    l2_rel             = ||xbar - m|| / ||m||
    sign_flip          = mean_d [sign xbar_d != sign m_d]
    sliced_wasserstein = mean over directions and quantiles of |q - b|

A baseline is a bias-corrected exponential moving average (Kingma and Ba 2015) of (xbar, q) in one vector: after n
updates with decay c the average is divided by 1 - c^n. An update adds the median over the clean replicas, element by
element and over finite values alone, so that an attacker not yet found cannot move it beyond what honest replicas sent:

    average <- c average + (1 - c) median over clean r of summary_r           (unchanged when no r has a finite value)

After arXiv 2603.03592; the formulas are our reading of its abstract and reviews.
"""

from __future__ import annotations

import torch

from deepspeed_sentinel.kernels.dispatch import LAUNCH, check_contiguous, check_output, runs_on_triton, tl, triton

DISTANCES = ("mean_abs", "l2_rel", "sign_flip", "sliced_wasserstein")
_TINY = torch.finfo(torch.float32).tiny
BLOCK = 1024  # elements that a program of the distances reads at once
_UPDATED = 2048  # elements times replicas that one program of the update sorts


def baseline_distances(
    means_MD: torch.Tensor, quantiles_MQ: torch.Tensor, average_V: torch.Tensor, correction: float
) -> torch.Tensor:
    """Distances of M messages to one baseline.

    Args:
        means_MD: float32 token means, one row a micro-batch.
        quantiles_MQ: float32 projected quantiles (directions x quantiles, flattened), one row a micro-batch.
        average_V: float32 [D + Q], the uncorrected average.
        correction: 1 - decay^n after n >= 1 updates, what the average is divided by.

    Returns:
        float32 [M, 4] in the order of ``DISTANCES``.

    Raises:
        ValueError: an argument has another shape, dtype or device.
    """
    if means_MD.dim() != 2 or means_MD.dtype != torch.float32:
        raise ValueError(f"means_MD must be float32 [M, D], got {means_MD.dtype} {list(means_MD.shape)}")
    messages, hidden = means_MD.shape
    quantiles = quantiles_MQ.shape[-1]
    check_output("quantiles_MQ", quantiles_MQ, torch.float32, (messages, quantiles), means_MD)
    check_output("average_V", average_V, torch.float32, (hidden + quantiles,), means_MD)
    if not runs_on_triton(means_MD):
        return baseline_distances_reference(means_MD, quantiles_MQ, average_V, correction)
    distances_M4 = torch.empty(messages, len(DISTANCES), dtype=torch.float32, device=means_MD.device)
    _distances_kernel[(messages,)](
        means_MD.contiguous(),
        quantiles_MQ.contiguous(),
        average_V.contiguous(),
        distances_M4,
        hidden,
        quantiles,
        correction,
        BLOCK=BLOCK,
        num_warps=4,
        **LAUNCH,
    )
    return distances_M4


@triton.jit
def _distances_kernel(
    means_ptr, quantiles_ptr, average_ptr, out_ptr, hidden, quantiles, correction, BLOCK: tl.constexpr
):
    """One message."""
    TINY: tl.constexpr = 1.1754943508222875e-38
    message = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    absolute = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    norm = tl.zeros([BLOCK], tl.float32)
    flips = tl.zeros([BLOCK], tl.int32)
    for first in range(0, hidden, BLOCK):
        d = first + offsets
        mean = tl.load(means_ptr + message * hidden + d, mask=d < hidden, other=0.0)
        expected = tl.div_rn(tl.load(average_ptr + d, mask=d < hidden, other=0.0), correction)
        gap = mean - expected
        absolute += tl.abs(gap)
        squares += gap * gap
        norm += expected * expected
        flips += (((mean > 0) != (expected > 0)) | ((mean < 0) != (expected < 0))).to(tl.int32)
    difference = tl.zeros([BLOCK], tl.float32)
    for first in range(0, quantiles, BLOCK):
        q = first + offsets
        value = tl.load(quantiles_ptr + message * quantiles + q, mask=q < quantiles, other=0.0)
        expected = tl.div_rn(tl.load(average_ptr + hidden + q, mask=q < quantiles, other=0.0), correction)
        difference += tl.abs(value - expected)
    out_ptr += message * 4
    tl.store(out_ptr, tl.div_rn(tl.sum(absolute, 0), tl.cast(hidden, tl.float32)))
    norm_of_mean = tl.maximum(tl.sqrt_rn(tl.sum(norm, 0)), TINY)
    tl.store(out_ptr + 1, tl.div_rn(tl.sqrt_rn(tl.sum(squares, 0)), norm_of_mean))
    tl.store(out_ptr + 2, tl.div_rn(tl.sum(flips, 0).to(tl.float32), tl.cast(hidden, tl.float32)))
    tl.store(out_ptr + 3, tl.div_rn(tl.sum(difference, 0), tl.cast(quantiles, tl.float32)))


def baseline_distances_reference(
    means_XMD: torch.Tensor, quantiles_XMQ: torch.Tensor, average_XV: torch.Tensor, correction: float
) -> torch.Tensor:
    """The definition; leading dimensions are baselines: [..., M, D], [..., M, Q], [..., D + Q] -> [..., M, 4]."""
    corrected_X1V = (average_XV / correction)[..., None, :]
    mean_X1D, quantiles_X1Q = corrected_X1V.split([means_XMD.shape[-1], quantiles_XMQ.shape[-1]], dim=-1)
    gap_XMD = means_XMD - mean_X1D
    norm_X1 = torch.linalg.vector_norm(mean_X1D, dim=-1).clamp_min(_TINY)
    return torch.stack(
        [
            gap_XMD.abs().mean(-1),
            torch.linalg.vector_norm(gap_XMD, dim=-1) / norm_X1,
            (torch.sign(means_XMD) != torch.sign(mean_X1D)).float().mean(-1),
            (quantiles_XMQ - quantiles_X1Q).abs().mean(-1),
        ],
        dim=-1,
    )


def baseline_update(average_V: torch.Tensor, summaries_RV: torch.Tensor, clean_R: torch.Tensor, decay: float) -> None:
    """Add one step to a baseline, in place.

    Args:
        average_V: float32, the uncorrected average; zeros before the first update.
        summaries_RV: float32, what each replica contributes.
        clean_R: bool, whose rows count; the others may hold anything. Of those that count, elements that are not
            finite are left out.
        decay: of the average, above 0 and below 1.

    Raises:
        ValueError: an argument has another shape, dtype or device.
    """
    if summaries_RV.dim() != 2 or summaries_RV.dtype != torch.float32:
        raise ValueError(f"summaries_RV must be float32 [R, V], got {summaries_RV.dtype} {list(summaries_RV.shape)}")
    check_output("average_V", average_V, torch.float32, (summaries_RV.shape[1],), summaries_RV)
    check_output("clean_R", clean_R, torch.bool, (summaries_RV.shape[0],), summaries_RV)
    check_contiguous(average_V=average_V, clean_R=clean_R)
    replicas, values = summaries_RV.shape
    if not runs_on_triton(summaries_RV):
        average_V.copy_(baseline_update_reference(average_V, summaries_RV, clean_R, decay))
        return
    width = max(2, 1 << (replicas - 1).bit_length())
    block = max(1, _UPDATED // width)
    _update_kernel[(-(-values // block),)](
        average_V,
        summaries_RV,
        clean_R,
        replicas,
        values,
        *summaries_RV.stride(),
        decay,
        1.0 - decay,
        BV=block,
        BR=width,
        num_warps=4,
        **LAUNCH,
    )


@triton.jit
def _update_kernel(
    average_ptr,
    summaries_ptr,
    clean_ptr,
    replicas,
    values,
    stride_r,
    stride_v,
    decay,
    rest,
    BV: tl.constexpr,
    BR: tl.constexpr,
):
    """BV elements of the average: sort them over the replicas, those that do not count last, and take the middle."""
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    r = tl.arange(0, BR)
    clean = tl.load(clean_ptr + r, mask=r < replicas, other=0) != 0
    inside = (v < values)[:, None] & clean[None, :]
    places = r.to(tl.int64)[None, :] * stride_r + v.to(tl.int64)[:, None] * stride_v
    summaries = tl.load(summaries_ptr + places, mask=inside, other=float("inf"))
    finite = tl.abs(summaries) < float("inf")  # false for NaN, which a sort by comparisons would not survive
    ordered = tl.sort(tl.where(finite, summaries, float("inf")))
    count = tl.sum(finite.to(tl.int32), 1)
    low = tl.sum(tl.where(r[None, :] == ((count - 1) // 2)[:, None], ordered, 0.0), 1)
    high = tl.sum(tl.where(r[None, :] == (count // 2)[:, None], ordered, 0.0), 1)
    average = tl.load(average_ptr + v, mask=v < values, other=0.0)
    updated = decay * average + rest * ((low + high) * 0.5)
    tl.store(average_ptr + v, updated, mask=(v < values) & (count > 0))


def baseline_update_reference(
    average_XV: torch.Tensor, summaries_XRV: torch.Tensor, clean_XR: torch.Tensor, decay: float
) -> torch.Tensor:
    """The definition; leading dimensions are baselines: [..., V], [..., R, V], [..., R] -> the new [..., V]."""
    counts_XRV = clean_XR[..., None] & summaries_XRV.isfinite()
    sorted_XRV = torch.where(counts_XRV, summaries_XRV, torch.inf).sort(dim=-2).values
    count_X1V = counts_XRV.sum(-2, keepdim=True)
    low_XV, high_XV = (
        torch.take_along_dim(sorted_XRV, rank_X1V.clamp_min(0) // 2, dim=-2).squeeze(-2)
        for rank_X1V in (count_X1V - 1, count_X1V)
    )
    median_XV = (low_XV + high_XV) / 2
    return torch.where(count_X1V.squeeze(-2) > 0, decay * average_XV + (1.0 - decay) * median_XV, average_XV)
