"""The one collective of a step: every rank's report to all ranks, and its way into Evidence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.evidence.probe import ENDS, End, EndStatistics
from deepspeed_sentinel.evidence.table import OF_PAIR, RECEIVED, SENT, TABLE, Evidence
from deepspeed_sentinel.kernels.tensor_digest import DIGEST_WORDS
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh

_STATISTICS = len(TABLE)
_PAIR = int(np.argmax(OF_PAIR))
assert OF_PAIR[_PAIR:].all(), "rows of pairs stand last"


def build_report(
    micro_batches: int,
    baselines: Baselines,
    statistics: Mapping[End, EndStatistics],
    pair_rows: Mapping[End, torch.Tensor],
) -> torch.Tensor:
    """int32 [4 ends, M, statistics + digest words]: float32 statistics by their bits, then the digest.

    Ends that this worker does not have (first and last stage) stay zero, statistics of pairs it does not have NaN.
    """
    device = next(iter(statistics.values())).means_MD.device
    values = torch.zeros(len(ENDS), micro_batches, len(TABLE), device=device)
    values[..., _PAIR:] = float("nan")
    digests = torch.zeros(len(ENDS), micro_batches, DIGEST_WORDS, dtype=torch.int32, device=device)
    for end, rows in statistics.items():
        index = ENDS.index(end)
        values[index, :, :_PAIR] = torch.cat([baselines.distances(end, rows), rows.scalars_M3], dim=1)
        digests[index] = rows.digest_M2
    for end, pair in pair_rows.items():
        values[ENDS.index(end), :, _PAIR:] = pair
    return torch.cat([values.view(torch.int32), digests], dim=-1)


class Exchange:
    """Gathers reports over all ranks and summaries over the replicas of a stage.

    Args:
        mesh: the mesh.
        ranks: int [S, R], the global rank of each worker.
        replica_group: process group of this stage's replicas, in replica order.
    """

    def __init__(self, mesh: Mesh, ranks: np.ndarray, replica_group: dist.ProcessGroup) -> None:
        self._mesh = mesh
        self._ranks = ranks
        self._replica_group = replica_group

    def gather_reports(self, report: torch.Tensor, step: int) -> Evidence:
        """All ranks' reports as Evidence: one all-gather, one copy to the host."""
        world = self._ranks.size
        gathered = torch.empty((world * report.shape[0], *report.shape[1:]), dtype=report.dtype, device=report.device)
        dist.all_gather_single(gathered, report)
        host = gathered.cpu().numpy().reshape(world, *report.shape)
        return self.assemble(host[self._ranks], step)

    def gather_summaries(self, summary: torch.Tensor) -> torch.Tensor:
        """float32 [V] of this replica -> float32 [R, V] of all replicas of the stage."""
        gathered = summary.new_empty(self._mesh.replicas * summary.numel())
        dist.all_gather_single(gathered, summary, group=self._replica_group)
        return gathered.view(self._mesh.replicas, -1)

    def assemble(self, reports: np.ndarray, step: int) -> Evidence:
        """int32 [S, R, 4 ends, M, statistics + digest words] -> Evidence."""

        def ends(direction: int, role: int) -> np.ndarray:
            of_all_stages = reports[:, :, ENDS.index((direction, role))]
            sends_from_below = (direction == FORWARD) == (role == SENT)
            return of_all_stages[:-1] if sends_from_below else of_all_stages[1:]

        packed = np.ascontiguousarray(
            [[ends(direction, role) for direction in (FORWARD, BACKWARD)] for role in (SENT, RECEIVED)]
        )
        statistics = np.ascontiguousarray(packed[..., :_STATISTICS]).view(np.float32).astype(np.float64)
        # The stage that sends cannot be asked about its pair: its neighbour on the other side reports it, one stage
        # before the sender, at the end over which the micro-batch entered it.
        pair = statistics[SENT, ..., _PAIR:]
        pair[FORWARD, 1:], pair[FORWARD, :1] = pair[FORWARD, :-1].copy(), np.nan
        pair[BACKWARD, :-1], pair[BACKWARD, -1:] = pair[BACKWARD, 1:].copy(), np.nan
        digests = np.ascontiguousarray(packed[..., _STATISTICS:]).view(np.int64)[..., 0]
        return Evidence(self._mesh, step, statistics, digests)
