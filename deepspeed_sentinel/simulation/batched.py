"""The kernels' definitions for many messages at once: what ``evidence/probe.py`` computes message by message."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepspeed_sentinel.evidence.probe import EndStatistics
from deepspeed_sentinel.evidence.transfer import Sketches
from deepspeed_sentinel.kernels.message_statistics import message_statistics_reference
from deepspeed_sentinel.kernels.sliced_wasserstein import sliced_wasserstein_reference
from deepspeed_sentinel.kernels.token_sketch import token_sketch_reference


@dataclass(frozen=True)
class MessageRows:
    """What is kept of N messages.

    Attributes:
        statistics: with N in place of M.
        sketches: [N, m, ...], one for all purposes: nobody in a simulation looks at the seeds.
    """

    statistics: EndStatistics
    sketches: Sketches


@torch.no_grad()
def message_rows(x_NTD: torch.Tensor, seeds_12: torch.Tensor) -> MessageRows:
    """Statistics of N messages, in the unit they come in.

    Args:
        x_NTD: floating point.
        seeds_12: int64 [1, 2], sample and projection seed of the sketches.
    """
    sums_ND, scalars_N3, digest_N2 = message_statistics_reference(x_NTD)
    sketch_N1mK, norms_N1m = token_sketch_reference(x_NTD, seeds_12)
    tokens, hidden = x_NTD.shape[1:]
    scalars_N3 = scalars_N3 / scalars_N3.new_tensor([tokens * hidden, 1.0, 1.0])
    return MessageRows(
        EndStatistics(
            means_MD=sums_ND / tokens,
            quantiles_MQ=sliced_wasserstein_reference(sketch_N1mK[:, 0], hidden),
            scalars_M3=scalars_N3,
            digest_M2=digest_N2,
        ),
        Sketches(sketch_N1mK[:, 0], norms_N1m[:, 0]),
    )


def join_rows(parts: list[MessageRows], columns: int) -> MessageRows:
    """Rows of all micro-batches of a link, column by column, from parts of some micro-batches of all columns."""
    if len(parts) == 1:
        return parts[0]

    def joined(pieces: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([piece.unflatten(0, (columns, -1)) for piece in pieces], dim=1).flatten(0, 1)

    names = EndStatistics.__dataclass_fields__
    return MessageRows(
        EndStatistics(**{name: joined([getattr(part.statistics, name) for part in parts]) for name in names}),
        Sketches(
            joined([part.sketches.sketch_XmK for part in parts]), joined([part.sketches.norms_Xm for part in parts])
        ),
    )
