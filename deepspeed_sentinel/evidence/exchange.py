"""The one collective of a step: every rank's report to all ranks, and its way into Evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.compat import all_gather_single
from deepspeed_sentinel.evidence.parts import Layout
from deepspeed_sentinel.evidence.probe import ENDS, End
from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import BY_JUDGE, OF_PAIR, RECEIVED, SENT, TABLE
from deepspeed_sentinel.kernels.tensor_digest import DIGEST_WORDS
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh

Place = tuple[End, int]  # an end and a part
REPORTED = int(np.count_nonzero(~BY_JUDGE))
OWN = int(np.argmax(OF_PAIR))  # rows of a message alone
assert OF_PAIR[OWN:REPORTED].all() and not BY_JUDGE[:REPORTED].any(), "rows of pairs stand after those of messages"


def build_report(
    micro_batches: int,
    layout: Layout,
    own_rows: Mapping[Place, torch.Tensor],
    pair_rows: Mapping[Place, torch.Tensor],
    digests: Mapping[End, torch.Tensor],
    keyed: Mapping[End, torch.Tensor],
) -> torch.Tensor:
    """int32 [4 ends, M, P * statistics + T * digest words + 1]: float32 statistics by their bits, the digests, and half
    of a keyed digest.

    What was received alone has a keyed digest: its low word stands at the sending end of that direction.

    Ends that this worker does not have (first and last stage) stay zero, statistics that it does not have NaN.

    Args:
        micro_batches: M.
        layout: how many parts and digests there are.
        own_rows: float32 [M, OWN] of each judged part.
        pair_rows: float32 [M, PAIR_ROWS], where there are any.
        digests: int32 [M, T, words] of each end.
        keyed: int64 [M] of each end at which messages are received.
    """
    device = next(iter(digests.values())).device
    values = torch.zeros(len(ENDS), micro_batches, layout.parts, REPORTED, device=device)
    values[..., OWN:] = torch.nan
    words = torch.zeros(len(ENDS), micro_batches, layout.slots, DIGEST_WORDS, dtype=torch.int32, device=device)
    for end, digests_MT2 in digests.items():
        words[ENDS.index(end)] = digests_MT2
        values[ENDS.index(end)] = torch.nan
    for (end, part), rows in own_rows.items():
        values[ENDS.index(end), :, part, :OWN] = rows
    for (end, part), rows in pair_rows.items():
        values[ENDS.index(end), :, part, OWN:] = rows
    halves = torch.zeros(len(ENDS), micro_batches, 1, dtype=torch.int32, device=device)
    for (direction, role), keyed_M in keyed.items():
        assert role == RECEIVED, role
        low, high = (ENDS.index((direction, one)) for one in (SENT, RECEIVED))
        halves[low, :, 0], halves[high, :, 0] = keyed_M.view(torch.int32).view(-1, 2).unbind(1)
    return torch.cat([values.view(torch.int32).flatten(2), words.flatten(2), halves], dim=-1)


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

    def gather_reports(self, report: torch.Tensor, step: int, layout: Layout, wiring: np.ndarray) -> Evidence:
        """All ranks' reports as Evidence, column by column of a wiring: one all-gather, one copy to the host."""
        world = self._ranks.size
        gathered = torch.empty((world * report.shape[0], *report.shape[1:]), dtype=report.dtype, device=report.device)
        all_gather_single(gathered, report)
        host = gathered.cpu().numpy().reshape(world, *report.shape)
        serving_SC = np.take_along_axis(self._ranks, wiring, axis=1)
        return replace(self.assemble(host[serving_SC], step, layout), dealt=wiring)

    def gather_summaries(self, summary: torch.Tensor) -> torch.Tensor:
        """float32 [V] of this replica -> float32 [R, V] of all replicas of the stage."""
        gathered = summary.new_empty(self._mesh.replicas * summary.numel())
        all_gather_single(gathered, summary, group=self._replica_group)
        return gathered.view(self._mesh.replicas, -1)

    def assemble(self, reports: np.ndarray, step: int, layout: Layout) -> Evidence:
        """int32 [S, C, 4 ends, M, P * statistics + T * digest words + 1] -> Evidence."""

        def ends(direction: int, role: int) -> np.ndarray:
            of_all_stages = reports[:, :, ENDS.index((direction, role))]
            sends_from_below = (direction == FORWARD) == (role == SENT)
            return of_all_stages[:-1] if sends_from_below else of_all_stages[1:]

        shape, split = (2, self._mesh.links, self._mesh.replicas, reports.shape[3]), layout.parts * REPORTED
        # Statistic by statistic in memory, which is how they are judged.
        statistics = np.zeros((2, layout.parts, len(TABLE), *shape), np.float32)
        words = np.empty((2, *shape, reports.shape[-1] - 1 - split), reports.dtype)
        for role in (SENT, RECEIVED):
            for direction in (FORWARD, BACKWARD):
                rows_LRMV = ends(direction, role)
                words[role, direction] = rows_LRMV[..., split:-1]
                reported = rows_LRMV[..., :split].reshape(*shape[1:], layout.parts, REPORTED)
                for link, of_link in enumerate(reported):  # one at a time stays in the processor's own memory
                    read = _on_every_host(of_link)
                    statistics[role, :, :REPORTED, direction, link] = np.moveaxis(read, (-2, -1), (0, 1))
        keyed = np.zeros(shape, np.int64)
        for direction in (FORWARD, BACKWARD):
            of_receivers = reports[1:] if direction == FORWARD else reports[:-1]
            halves = [of_receivers[:, :, ENDS.index((direction, role)), :, -1] for role in (SENT, RECEIVED)]
            keyed[direction] = np.stack(halves, axis=-1).view(np.int64)[..., 0]
        # The stage that sends cannot be asked about its pair: its neighbour on the other side reports it, one stage
        # before the sender, at the end over which the micro-batch entered it.
        pair = statistics[SENT, :, OWN:REPORTED]
        forward, backward = pair[:, :, FORWARD], pair[:, :, BACKWARD]
        forward[:, :, 1:], forward[:, :, :1] = forward[:, :, :-1].copy(), np.nan
        backward[:, :, :-1], backward[:, :, -1:] = backward[:, :, 1:].copy(), np.nan
        # Nor has it one in what the receiver reports, if it is the first stage or the last.
        received = statistics[RECEIVED, :, OWN:REPORTED]
        received[:, :, FORWARD, 0] = received[:, :, BACKWARD, -1] = np.nan
        return Evidence(
            self._mesh,
            step,
            np.moveaxis(statistics.reshape(2, -1, *shape), 1, -1),
            layout.mark_all(words.view(np.int64)),
            keyed=keyed,
        )


def _on_every_host(words: np.ndarray) -> np.ndarray:
    """float32 of their bits, int32, as all hosts see them alike.

    Some processes flush denormal numbers to zero, by their own choice or by that of a library that was compiled for
    speed; to others a mean square of 1e-39 is a number. So it is zero here, as is zero with a sign, and there is one
    NaN. Integers decide, which no such mode reaches.
    """
    exponent = words & 0x7F800000
    plain = np.where(exponent == 0, 0, words)
    return np.where((exponent == 0x7F800000) & (words & 0x007FFFFF != 0), 0x7FC00000, plain).view(np.float32)
