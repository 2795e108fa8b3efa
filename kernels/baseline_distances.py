"""The four distances of a step's messages to their EMA baseline, and the baseline's update.

With xbar the mean of a message over its tokens, m the baseline of such means, q the message's quantiles along
random unit directions and b the baseline of those quantiles:

    mean_abs           = mean_d |xbar_d - m_d|
    l2_rel             = ||xbar - m|| / ||m||
    sign_flip          = mean_d [sign xbar_d != sign m_d]
    sliced_wasserstein = mean over directions and quantiles of |q - b|

A baseline is a bias-corrected exponential moving average (Kingma and Ba 2015) of (xbar, q) in one vector: after n
updates with decay c the average is divided by 1 - c^n. An update adds the median over the clean replicas, element by
element, so that an attacker not yet found cannot move it beyond what honest replicas sent:

    average <- c average + (1 - c) median over clean r of summary_r           (unchanged when no replica is clean)

After arXiv 2603.03592; the formulas are our reading of its abstract and reviews.
"""

from __future__ import annotations

import torch

from deepspeed_sentinel.kernels.dispatch import check_output

DISTANCES = ("mean_abs", "l2_rel", "sign_flip", "sliced_wasserstein")
_TINY = torch.finfo(torch.float32).tiny


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
    return baseline_distances_reference(means_MD, quantiles_MQ, average_V, correction)


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
        clean_R: bool, whose rows count; the others may hold anything.
        decay: of the average, above 0 and below 1.

    Raises:
        ValueError: an argument has another shape, dtype or device.
    """
    if summaries_RV.dim() != 2 or summaries_RV.dtype != torch.float32:
        raise ValueError(f"summaries_RV must be float32 [R, V], got {summaries_RV.dtype} {list(summaries_RV.shape)}")
    check_output("average_V", average_V, torch.float32, (summaries_RV.shape[1],), summaries_RV)
    check_output("clean_R", clean_R, torch.bool, (summaries_RV.shape[0],), summaries_RV)
    average_V.copy_(baseline_update_reference(average_V, summaries_RV, clean_R, decay))


def baseline_update_reference(
    average_XV: torch.Tensor, summaries_XRV: torch.Tensor, clean_XR: torch.Tensor, decay: float
) -> torch.Tensor:
    """The definition; leading dimensions are baselines: [..., V], [..., R, V], [..., R] -> the new [..., V]."""
    masked_XRV = torch.where(clean_XR[..., None], summaries_XRV, torch.inf)
    sorted_XRV = masked_XRV.sort(dim=-2).values
    count_X11 = clean_XR.sum(-1)[..., None, None]
    middle_XV = [
        torch.take_along_dim(sorted_XRV, (rank_X11.clamp_min(0) // 2).expand(*average_XV.shape[:-1], 1, 1), dim=-2)
        for rank_X11 in (count_X11 - 1, count_X11)
    ]
    median_XV = ((middle_XV[0] + middle_XV[1]) / 2).squeeze(-2)
    return torch.where(count_X11[..., 0] > 0, decay * average_XV + (1.0 - decay) * median_XV, average_XV)
