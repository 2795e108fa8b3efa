"""Reading the messages of one link, all columns at once: statistics of both ends, and the sketches of their pairs.

Dimension key: C columns, M micro-batches, N = C M messages, B sequences of a message, T tokens, D hidden size,
m sketched tokens, K sketch dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from deepspeed_sentinel.evidence.buffers import EndStatistics
from deepspeed_sentinel.evidence.collector import PUBLIC_SEED
from deepspeed_sentinel.evidence.renewal import Renewal
from deepspeed_sentinel.evidence.transfer import Sketches
from deepspeed_sentinel.kernels.keyed_digest import DigestKey, keyed_digest_reference
from deepspeed_sentinel.kernels.message_statistics import message_statistics_reference
from deepspeed_sentinel.kernels.sliced_wasserstein import sliced_wasserstein_reference
from deepspeed_sentinel.kernels.token_sketch import TOKENS, sampled_rows, sketch_of_rows, token_sketch_reference
from deepspeed_sentinel.mesh import Mesh

_BITS = 62
_STEP, _LASTING, _KEY = range(3)  # what secrets are for


@dataclass(frozen=True)
class Looks:
    """Secret sketches of what entered or left a stage in all columns.

    Attributes:
        now: FRESH and LASTING, [2, C, M, m, K].
        ahead: NEXT, [1, c, M, m, K], of those c columns whose lasting projection is about to be renewed.
    """

    now: Sketches
    ahead: Sketches | None


@dataclass(frozen=True)
class Observation:
    """What is kept of a link's messages, column by column.

    Attributes:
        of_end: statistics as reported by the senders and by the receivers; rows are messages.
        digests: int32 [N, 2], likewise.
        keyed: int64 [N], the receivers' keyed digests, zeros in a step in which they take none.
        leaving: the receivers' sketches for the pair around the senders' stage; None for first and last stage.
        entering: the senders' sketches for the pair around the receivers' stage; None for first and last stage.
    """

    of_end: tuple[EndStatistics, EndStatistics]
    digests: tuple[torch.Tensor, torch.Tensor]
    keyed: torch.Tensor
    leaving: Looks | None
    entering: Looks | None


class Observer:
    """Takes observations.

    Attributes:
        renewal: of the lasting projections, [2, S, C].

    Args:
        mesh: the mesh.
        seed: of the secrets: for each stage, direction and column a sample of tokens and a projection of the step,
            and a lasting projection.
        pairs: whether to take sketches for pairs at all.
    """

    def __init__(self, mesh: Mesh, seed: int, pairs: bool) -> None:
        self._mesh = mesh
        self._seed = seed
        self._pairs = pairs
        self._step = 0
        self._keyed = False
        self.renewal = Renewal.of(mesh)

    def begin_step(self, step: int, keyed: bool = False) -> None:
        """``keyed``: receivers take keyed digests, too."""
        self._step, self._keyed = step, keyed

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
            self._under_key(direction, self._mesh.receiver_stage(direction, link), received.flatten(0, 1)),
            leaving=self._look(direction, self._mesh.sender_stage(direction, link), received),
            entering=self._look(direction, self._mesh.receiver_stage(direction, link), sent),
        )

    def _under_key(self, direction: int, stage: int, x_NTD: torch.Tensor) -> torch.Tensor:
        """Digests by the workers of a stage, under a key that attackers do not know."""
        if not self._keyed:
            return torch.zeros(len(x_NTD), dtype=torch.int64, device=x_NTD.device)
        seed_1 = torch.from_numpy(_secrets(1, self._seed, _KEY, stage, direction, self._step)).to(x_NTD.device)
        return keyed_digest_reference(x_NTD, DigestKey(seed_1))

    def _look(self, direction: int, stage: int, x_CMTD: torch.Tensor) -> Looks | None:
        """Sketches for the pair around ``stage``."""
        if not self._pairs or self._mesh.is_trusted(stage):
            return None
        epoch_C, device = self.renewal.epoch_X[direction, stage], x_CMTD.device
        samples_C, fresh_C = _secrets(2 * len(x_CMTD), self._seed, _STEP, stage, direction, self._step).reshape(2, -1)
        if x_CMTD.shape[2] > TOKENS:  # otherwise every token is looked at, whatever the sample's seed
            index_Cm = sampled_rows(x_CMTD.shape[2], torch.from_numpy(samples_C).to(device))
            x_CMTD = torch.take_along_dim(x_CMTD, index_Cm[:, None, :, None], dim=2)

        def lasting(epochs_C: np.ndarray) -> np.ndarray:
            numbers = [
                _lasting(self._seed, stage, direction, column, epoch) for column, epoch in enumerate(epochs_C.tolist())
            ]
            return np.array(numbers)

        now = _sketch(x_CMTD, np.stack([fresh_C, lasting(epoch_C)], axis=1))
        columns = np.flatnonzero(self.renewal.overlapping_X[direction, stage])
        ahead = None
        if len(columns):
            ahead = _sketch(x_CMTD[columns], lasting(epoch_C + 1)[columns, None])
        return Looks(now, ahead)


def _sketch(rows_CMmD: torch.Tensor, seeds_CJ: np.ndarray) -> Sketches:
    """[J, C, M, m, K] of sampled tokens."""
    messages = rows_CMmD.shape[1]
    seeds = torch.from_numpy(seeds_CJ).to(rows_CMmD.device)
    sketch_CJnK, norms_Cn = sketch_of_rows(rows_CMmD.flatten(1, 2), seeds)
    return Sketches(
        sketch_CJnK.unflatten(2, (messages, -1)).transpose(0, 1).contiguous(), norms_Cn.unflatten(1, (messages, -1))
    )


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

    leaving, entering = (_join_looks([getattr(part, name) for part in parts]) for name in ("leaving", "entering"))
    digests = (rows(lambda part: part.digests[0]), rows(lambda part: part.digests[1]))
    return Observation((end(0), end(1)), digests, rows(lambda part: part.keyed), leaving, entering)


def _join_looks(parts: list[Looks | None]) -> Looks | None:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    ahead = [part.ahead for part in known if part.ahead is not None]
    return Looks(_join_sketches([part.now for part in known]), _join_sketches(ahead) if ahead else None)


def _join_sketches(parts: list[Sketches]) -> Sketches:
    sketches, norms = [part.sketch_JXmK for part in parts], [part.norms_Xm for part in parts]
    return Sketches(torch.cat(sketches, dim=2), torch.cat(norms, dim=1))


def _secrets(count: int, *parts: int) -> np.ndarray:
    """int64 [count]."""
    return np.random.default_rng(parts).integers(1 << _BITS, size=count)


@lru_cache(maxsize=4096)
def _lasting(*parts: int) -> int:
    return int(_secrets(1, parts[0], _LASTING, *parts[1:])[0])
