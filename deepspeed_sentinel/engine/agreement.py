"""Whether all ranks came to the same verdict."""

from __future__ import annotations

from collections.abc import Callable

import torch


def disagreement(digests: torch.Tensor, step: int, name: Callable[[int], str]) -> str | None:
    """Which ranks came to another verdict than most; None if all agree.

    Args:
        digests: int64 [ranks], of each rank's verdict.
        step: of the verdicts.
        name: of a rank.
    """
    values, counts = digests.unique(return_counts=True)
    if len(values) == 1:
        return None
    common = values[counts.argmax()]
    odd = [name(rank) for rank in torch.nonzero(digests != common).flatten().tolist()]
    return (
        f"verdicts differ at step {step}: {', '.join(odd)} came to another one than the other {int(counts.max())} "
        "ranks from the same evidence. Their memory, software versions or state differ."
    )
