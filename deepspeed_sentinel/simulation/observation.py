"""Reading the messages of one link, all columns at once: statistics of both ends, and the sketches of their pairs.

Dimension key: C columns, M micro-batches, N = C M messages, B sequences of a message, T tokens, D hidden size,
m sketched tokens, K sketch dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from deepspeed_sentinel.evidence.collector import PUBLIC_SEED
from deepspeed_sentinel.evidence.probe import EndStatistics
from deepspeed_sentinel.evidence.transfer import Sketches
from deepspeed_sentinel.kernels.message_statistics import message_statistics_reference
from deepspeed_sentinel.kernels.sliced_wasserstein import sliced_wasserstein_reference
from deepspeed_sentinel.kernels.token_sketch import TOKENS, token_sketch_reference
from deepspeed_sentinel.mesh import Mesh

_BITS = 62


@dataclass(frozen=True)
class Observation:
    """What is kept of a link's messages, column by column.

    Attributes:
        of_end: statistics as reported by the senders and by the receivers; rows are messages.
        digests: int32 [N, 2], likewise.
        leaving: the receivers' sketches for the pair around the senders' stage; None for first and last stage.
        entering: the senders' sketches for the pair around the receivers' stage; None for first and last stage.
    """

    of_end: tuple[EndStatistics, EndStatistics]
    digests: tuple[torch.Tensor, torch.Tensor]
    leaving: Sketches | None
    entering: Sketches | None


class Observer:
    """Takes observations.

    Args:
        mesh: the mesh.
        seed: of the secrets: a projection for each stage, and for each step and column a sample of tokens.
        pairs: whether to take sketches for pairs at all.
    """

    def __init__(self, mesh: Mesh, seed: int, pairs: bool) -> None:
        self._mesh = mesh
        self._seed = seed
        self._pairs = pairs
        self._step = 0

    def begin_step(self, step: int) -> None:
        self._step = step

    @torch.no_grad()
    def observe(self, direction: int, link: int, sent_CMBTD: torch.Tensor, received_CMBTD: torch.Tensor) -> Observation:
        """Read the messages of a link as its two ends report on them."""
        sent = sent_CMBTD.flatten(2, 3)
        received = sent if received_CMBTD is sent_CMBTD else received_CMBTD.flatten(2, 3)
        at_sender = end_statistics(sent.flatten(0, 1))
        at_receiver = at_sender if received is sent else end_statistics(received.flatten(0, 1))
        return Observation(
            (at_sender[0], at_receiver[0]),
            (at_sender[1], at_receiver[1]),
            leaving=self._sketch(self._mesh.sender_stage(direction, link), received),
            entering=self._sketch(self._mesh.receiver_stage(direction, link), sent),
        )

    def _sketch(self, stage: int, messages_CMTD: torch.Tensor) -> Sketches | None:
        """Sketches for the pair around ``stage``, [N, m, K]."""
        if not self._pairs or self._mesh.is_trusted(stage):
            return None
        projection = _secret(self._seed, stage)
        if messages_CMTD.shape[2] <= TOKENS:  # every token is looked at, whatever the sample's seed
            seeds = torch.tensor([[0, projection]])
        else:
            samples = [_secret(self._seed, stage, self._step, column) for column in range(len(messages_CMTD))]
            seeds = torch.tensor([[[[sample, projection]]] for sample in samples])
            seeds = seeds.expand(-1, messages_CMTD.shape[1], -1, -1)
        sketch, norms = token_sketch_reference(messages_CMTD, seeds.to(messages_CMTD.device))
        return Sketches(sketch[:, :, 0].flatten(0, 1), norms[:, :, 0].flatten(0, 1))


@torch.no_grad()
def end_statistics(x_NTD: torch.Tensor) -> tuple[EndStatistics, torch.Tensor]:
    """Statistics of N messages in the unit they come in, and their digests, int32 [N, 2]: what ``Probe`` gives for one
    end, N in place of M."""
    tokens, hidden = x_NTD.shape[1:]
    sums_ND, scalars_N3, digest_N2 = message_statistics_reference(x_NTD)
    energy_N, max_abs_N, non_finite_N = scalars_N3.unbind(1)
    public = torch.tensor([[PUBLIC_SEED, PUBLIC_SEED]], device=x_NTD.device)
    sketch_NJmK, _ = token_sketch_reference(x_NTD, public)
    statistics = EndStatistics(
        means_MD=sums_ND / tokens,
        quantiles_MQ=sliced_wasserstein_reference(sketch_NJmK[:, 0], hidden),
        scalars_M3=torch.stack([energy_N / (tokens * hidden), max_abs_N, non_finite_N], dim=1),
    )
    return statistics, digest_N2


def join(parts: list[Observation], columns: int) -> Observation:
    """Observations of successive micro-batches as one."""
    if len(parts) == 1:
        return parts[0]

    def rows(get: Callable[[Observation], torch.Tensor]) -> torch.Tensor:
        by_column = [get(part).unflatten(0, (columns, -1)) for part in parts]
        return torch.cat(by_column, dim=1).flatten(0, 1)

    def end(index: int) -> EndStatistics:
        names = EndStatistics.__dataclass_fields__
        return EndStatistics(**{name: rows(lambda part: getattr(part.of_end[index], name)) for name in names})  # noqa: B023

    def sketches(name: str) -> Sketches | None:
        if getattr(parts[0], name) is None:
            return None
        return Sketches(
            rows(lambda part: getattr(part, name).sketch_XmK), rows(lambda part: getattr(part, name).norms_Xm)
        )

    digests = (rows(lambda part: part.digests[0]), rows(lambda part: part.digests[1]))
    return Observation((end(0), end(1)), digests, sketches("leaving"), sketches("entering"))


def _secret(*parts: int) -> int:
    return int(np.random.default_rng(parts).integers(1 << _BITS))
