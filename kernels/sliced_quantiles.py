"""Quantiles of a message's tokens along random unit directions, the raw material of sliced Wasserstein.

    projected = X[rows] P          rows: evenly spread over the tokens, P: D x directions with unit columns
    quantile_pq = the ((q + 1/2) / Q)-quantile of column p of projected (nearest rank)

Sliced Wasserstein distance: Rabin et al. 2011; used on pipeline messages by arXiv 2603.03592.
"""

from __future__ import annotations

from functools import lru_cache

import torch

ROWS, DIRECTIONS, QUANTILES = 128, 16, 32


def project_rows(x_TD: torch.Tensor, directions_DP: torch.Tensor, out_RP: torch.Tensor) -> None:
    """Project ``ROWS`` tokens of a message; non-finite elements count as zero.

    Args:
        x_TD: floating-point message, T >= 1.
        directions_DP: float32, unit columns.
        out_RP: float32 [ROWS, P], out.
    """
    sampled_RD = x_TD.detach().index_select(0, _rows(x_TD.shape[0], x_TD.device)).float()
    torch.matmul(sampled_RD.nan_to_num_(0.0, 0.0, 0.0), directions_DP, out=out_RP)


def quantiles(projected_MRP: torch.Tensor) -> torch.Tensor:
    """float32 [M, ROWS, P] -> float32 [M, P * QUANTILES]."""
    sorted_MRP = projected_MRP.sort(dim=1).values
    ranks = ((torch.arange(QUANTILES, device=sorted_MRP.device) + 0.5) / QUANTILES * ROWS).long()
    return sorted_MRP.index_select(1, ranks).transpose(1, 2).flatten(1)


def unit_directions(hidden: int, seed: int, device: torch.device) -> torch.Tensor:
    """float32 [hidden, DIRECTIONS] with unit columns, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    directions_DP = torch.randn(hidden, DIRECTIONS, generator=generator)
    return (directions_DP / torch.linalg.vector_norm(directions_DP, dim=0)).to(device)


@lru_cache(maxsize=64)
def _rows(tokens: int, device: torch.device) -> torch.Tensor:
    return ((torch.arange(ROWS, dtype=torch.float64) + 0.5) / ROWS * tokens).long().to(device)
