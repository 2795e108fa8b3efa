"""Secret sketches: what the two neighbours of a stage keep of the messages that enter and leave it.

The workers below and above stage s draw its secrets by themselves: one projection for all replicas of the pair, and
one sequence of token samples for each column. So stage s cannot know which tokens are looked at, nor in which
directions. Once a step, after the last backward, the two swap what they sketched. Then each holds both halves: what
entered stage s and what left it, forward and backward.

Of the two pairs that a worker belongs to, it is the lower member of the pair around the stage above it (ABOVE) and
the upper member of the pair around the stage below it (BELOW).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.evidence.probe import ENDS, SECRET, End, Probe
from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.evidence.transfer import Sketches
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker

ABOVE, BELOW = 1, -1
PAIR_ENDS = {ABOVE: ((FORWARD, SENT), (BACKWARD, RECEIVED)), BELOW: ((FORWARD, RECEIVED), (BACKWARD, SENT))}
_BITS = 62


class PairSketches:
    """Seeds and swaps of one worker's two pairs. Building it is collective: all ranks do so together.

    Args:
        mesh: the mesh.
        worker: this worker.
        ranks: int [S, R], the global rank of each worker.
        device: where messages live.
        seed: secrets are computed from it; None draws them from the operating system, which repeats no run.
        control: group on the CPU over which drawn secrets travel from one neighbour to the other.
    """

    def __init__(
        self,
        mesh: Mesh,
        worker: Worker,
        ranks: np.ndarray,
        device: torch.device,
        seed: int | None,
        control: dist.ProcessGroup | None,
    ) -> None:
        self._device = device
        self._mesh, self._stage = mesh, worker.stage
        self.partners = {
            side: int(ranks[worker.stage + 2 * side, worker.replica])
            for side in (ABOVE, BELOW)
            if 0 <= worker.stage + 2 * side < mesh.stages
        }
        self._samples: dict[int, int] = {}
        self.projections: dict[int, int] = {}
        for side in self.partners:
            between = worker.stage + side
            if seed is not None:
                self.projections[side] = _derive(seed, "projection", between)
                self._samples[side] = _derive(seed, "sample", between, worker.replica)
            else:
                lower = ranks[between - 1]
                everyone = [*lower, *ranks[between + 1]]
                own = int(ranks[worker])
                self.projections[side] = _agree(own, int(lower[0]), [int(rank) for rank in everyone], control)
                self._samples[side] = _agree(own, int(lower[worker.replica]), [self.partners[side], own], control)
        self.ends = tuple(end for end in ENDS if _side(end) in self.partners)

    def seeds(self, step: int, public_seed: int) -> dict[End, torch.Tensor]:
        """Per end of a pair int64 [2, 2] on the device: sample and projection seed, public row first."""
        rows = {
            side: torch.tensor(
                [[public_seed, public_seed], self.step_seeds(PAIR_ENDS[side][0], step)],
                dtype=torch.int64,
            ).to(self._device, non_blocking=True)
            for side in self.partners
        }
        return {end: rows[_side(end)] for end in self.ends}

    def step_seeds(self, end: End, step: int) -> tuple[int, int]:
        """Seeds of the secret sketches at an end: of the step's sample, and of the projection."""
        side = _side(end)
        return _derive(self._samples[side], step), self.projections[side]

    def to_keep(self, step: int, micro_batches: int) -> dict[End, int]:
        """Per end of a pair the micro-batch that both neighbours keep for an audit, where one can come to it."""
        return {
            end: _derive(self._samples[_side(end)], step, "keep") % micro_batches
            for end in self.ends
            if not self._mesh.neighbours_are_trusted(self._stage + _side(end))
        }

    def swap(self, probe: Probe) -> dict[End, tuple[Sketches, Sketches]]:
        """What entered and what left the neighbouring stages: {own end: (entering, leaving)}, [P * M, m, ...] each."""
        own = {side: self._pack(probe, side) for side in self.partners}
        theirs = {side: torch.empty_like(packed) for side, packed in own.items()}
        operations = []
        for side, partner in self.partners.items():
            operations.append(dist.P2POp(dist.isend, own[side], partner))
            operations.append(dist.P2POp(dist.irecv, theirs[side], partner))
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        result = {}
        for side in self.partners:
            for end in PAIR_ENDS[side]:
                # The partner packs the same directions in the same order, each at its own end of the stage.
                index = PAIR_ENDS[side].index(end)
                mine, other = (_unpack(packed[index]) for packed in (own[side], theirs[side]))
                result[end] = (mine, other) if end[1] == SENT else (other, mine)
        return result

    def state_dict(self) -> dict[str, int]:
        return {str(side): projection for side, projection in self.projections.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take the projections over, which what was learnt depends on; token samples are drawn anew."""
        self.projections = {side: int(state[str(side)]) for side in self.projections}

    @staticmethod
    def _pack(probe: Probe, side: int) -> torch.Tensor:
        """float32 [2 directions, P * M, TOKENS, K + 2]: sketches, norms, and how many tokens the message had."""
        parts = []
        for end in PAIR_ENDS[side]:
            sketch_MmK, norms_Mm = probe.sketches(end, SECRET)
            tokens_Mm = probe.token_counts(end)[:, None].expand_as(norms_Mm)
            parts.append(torch.cat([sketch_MmK, norms_Mm[..., None], tokens_Mm[..., None]], dim=-1))
        return torch.stack(parts)


def _unpack(packed_MmV: torch.Tensor) -> Sketches:
    return Sketches(
        packed_MmV[..., :DIMENSIONS].contiguous(),
        packed_MmV[..., DIMENSIONS].contiguous(),
        packed_MmV[..., 0, DIMENSIONS + 1],
    )


def _side(end: End) -> int:
    return ABOVE if end in PAIR_ENDS[ABOVE] else BELOW


def _derive(*parts: object) -> int:
    """A seed from anything printable, the same everywhere; a later step's cannot be guessed from an earlier one's."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _BITS)


def _agree(own: int, draws: int, members: list[int], control: dist.ProcessGroup | None) -> int:
    """A number that rank ``draws`` draws and the other members learn from it, nobody else."""
    number = torch.tensor([secrets.randbits(_BITS)])
    if own != draws:
        dist.recv(number, src=draws, group=control)
        return int(number)
    for member in members:
        if member != own:
            dist.send(number, dst=member, group=control)
    return int(number)
