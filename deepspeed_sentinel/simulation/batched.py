"""The kernels' definitions for many messages at once: what ``evidence/probe.py`` computes message by message."""

from __future__ import annotations

import torch

from deepspeed_sentinel.evidence.probe import EndStatistics
from deepspeed_sentinel.kernels.message_statistics import DIGEST_WORDS
from deepspeed_sentinel.kernels.sliced_quantiles import ROWS, quantiles


@torch.no_grad()
def message_rows(x_NTD: torch.Tensor, directions_DP: torch.Tensor) -> EndStatistics:
    """Statistics of N messages, in the unit they come in.

    Args:
        x_NTD: floating point.
        directions_DP: float32 unit columns.

    Returns:
        Rows with N in place of M. Digests are zero: in one process nothing is corrupted in transit.
    """
    values = x_NTD.float()
    non_finite_N = torch.zeros(len(values), device=values.device)
    if values.device.type != "cpu" or not torch.isfinite(values.sum()):
        finite = torch.isfinite(values)
        non_finite_N = torch.count_nonzero(~finite, dim=(1, 2)).float()
        values = torch.where(finite, values, 0.0)
    count = values.shape[1] * values.shape[2]
    flat = values.flatten(1)
    rows_R = ((torch.arange(ROWS, dtype=torch.float64) + 0.5) / ROWS * values.shape[1]).long().to(values.device)
    projected_NRP = values[:, rows_R] @ directions_DP
    return EndStatistics(
        means_MD=values.mean(1),
        quantiles_MQ=quantiles(projected_NRP),
        scalars_M3=torch.stack([flat.square().sum(1) / count, flat.abs().amax(1), non_finite_N], dim=1),
        digest_M2=torch.zeros(len(values), DIGEST_WORDS, dtype=torch.int32, device=values.device),
    )
