"""The four distances of a step's messages to their EMA baseline, all micro-batches at once.

With xbar the mean of a message over its tokens, m the baseline of such means, q the message's quantiles along
random unit directions and b the baseline of those quantiles:

    mean_abs           = mean_d |xbar_d - m_d|
    l2_rel             = ||xbar - m|| / ||m||
    sign_flip          = mean_d [sign xbar_d != sign m_d]
    sliced_wasserstein = mean over directions and quantiles of |q - b|

After arXiv 2603.03592; the formulas are our reading of its abstract and reviews.
"""

from __future__ import annotations

import torch

DISTANCES = ("mean_abs", "l2_rel", "sign_flip", "sliced_wasserstein")


def baseline_distances(
    means_MD: torch.Tensor, quantiles_MQ: torch.Tensor, mean_D: torch.Tensor, quantiles_Q: torch.Tensor
) -> torch.Tensor:
    """Distances of M messages to one baseline.

    Args:
        means_MD: float32 token means, one row a micro-batch.
        quantiles_MQ: float32 projected quantiles (directions x quantiles, flattened), one row a micro-batch.
        mean_D: float32 baseline of the means.
        quantiles_Q: float32 baseline of the quantiles.

    Returns:
        float32 [M, 4] in the order of ``DISTANCES``.
    """
    gap_MD = means_MD - mean_D
    norm = torch.linalg.vector_norm(mean_D).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.stack(
        [
            gap_MD.abs().mean(1),
            torch.linalg.vector_norm(gap_MD, dim=1) / norm,
            (torch.sign(means_MD) != torch.sign(mean_D)).float().mean(1),
            (quantiles_MQ - quantiles_Q).abs().mean(1),
        ],
        dim=1,
    )
