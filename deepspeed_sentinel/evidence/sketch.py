"""Secret sketches: what the two neighbours of a stage keep of the messages that enter and leave it.

The workers below and above stage s agree on its secrets by themselves (``evidence.keys``), each pair of neighbours on
its own. So neither stage s nor a worker of another column can know which tokens are looked at, nor in which
directions. Sample and FRESH projection are drawn anew in every step; the LASTING projection, which what is learnt of
the stage depends on, stays until its renewal (``evidence.renewal``), before which the NEXT one is sketched too.

Once a step, after the last backward, the two swap what they sketched. Then each holds both halves: what entered stage s
and what left it, forward and backward.

Of the two pairs that a worker belongs to, it is the lower member of the pair around the stage above it (ABOVE) and
the upper member of the pair around the stage below it (BELOW).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.evidence.keys import Keys, Secret
from deepspeed_sentinel.evidence.probe import ENDS, SECRET, End, Probe
from deepspeed_sentinel.evidence.renewal import Renewal, of_senders
from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.evidence.transfer import Sketches
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker, columns_of, identity

ABOVE, BELOW = 1, -1
PAIR_ENDS = {ABOVE: ((FORWARD, SENT), (BACKWARD, RECEIVED)), BELOW: ((FORWARD, RECEIVED), (BACKWARD, SENT))}


@dataclass(frozen=True)
class _Pair:
    """One of a worker's two pairs.

    Attributes:
        partner: global rank of the other neighbour.
        secret: what the two share.
        names: the two ranks, lower stage first, the stage between and the column: what every secret is derived for.
    """

    partner: int
    secret: Secret
    names: tuple[int, int, int, int]

    def number(self, purpose: str, *more: int) -> int:
        return self.secret.number(purpose, *self.names, *more)


@dataclass(frozen=True)
class Change:
    """What the end of a step means for a pair's knowledge in one direction, each bool [].

    Attributes:
        clean: it is learnt from.
        renewed: the next projection takes over, with what was learnt in it.
        stale: it starts anew, with nothing.
    """

    clean: np.ndarray
    renewed: np.ndarray
    stale: np.ndarray


class PairSketches:
    """Seeds and swaps of one worker's two pairs, which go by the wiring: at first DeepSpeed's own.

    Attributes:
        renewal: of the lasting projections of all pairs of the mesh, [2, S, C].

    Args:
        mesh: the mesh.
        worker: this worker.
        ranks: int [S, R], the global rank of each worker.
        device: where messages live.
        keys: this worker's.
    """

    def __init__(self, mesh: Mesh, worker: Worker, ranks: np.ndarray, device: torch.device, keys: Keys) -> None:
        self._device, self._keys = device, keys
        self._mesh, self._worker, self._ranks = mesh, worker, ranks
        self.renewal = Renewal.of(mesh)
        self._sides = tuple(side for side in (ABOVE, BELOW) if 0 <= worker.stage + 2 * side < mesh.stages)
        self.ends = tuple(end for end in ENDS if _side(end) in self._sides)
        self._wiring = identity(mesh)
        self._pairs = self._paired()

    def wire(self, wiring: np.ndarray) -> dict[End, np.ndarray]:
        """Go by another wiring from the next step on. Pairs that it parts, or moves to another column, start anew.

        Args:
            wiring: int64 [S, C].

        Returns:
            per end bool [], whether its pair starts anew.
        """
        moved_SC = wiring != self._wiring
        parted_SC = np.zeros_like(moved_SC)
        parted_SC[1:-1] = moved_SC[:-2] | moved_SC[2:]
        self._wiring = wiring
        self._pairs = self._paired()
        self.renewal.forget(parted_SC)
        return {end: np.asarray(parted_SC[self._place(end)[1:]]) for end in self.ends}

    def _paired(self) -> dict[int, _Pair]:
        pairs = {}
        column = int(columns_of(self._wiring)[self._worker])
        ranks_S = np.take_along_axis(self._ranks, self._wiring, axis=1)[:, column].tolist()
        for side in self._sides:
            between = self._worker.stage + side
            lower, upper = ranks_S[between - 1], ranks_S[between + 1]
            partner = upper if side == ABOVE else lower
            pairs[side] = _Pair(partner, self._keys.secret_with(partner), (lower, upper, between, column))
        return pairs

    def ready(self, end: End) -> bool:
        """Whether enough was learnt in the lasting projection to measure against it."""
        return bool(self.renewal.ready_X[self._place(end)])

    def learn(self, clean_2LC: np.ndarray) -> dict[End, Change]:
        """End a step in which these messages were clean, bool [2, L, C]."""
        clean_2SC = of_senders(clean_2LC)
        renewed_2SC, stale_2SC = self.renewal.learn(clean_2SC)
        places = {end: self._place(end) for end in self.ends}
        return {
            end: Change(*(np.asarray(which[place]) for which in (clean_2SC, renewed_2SC, stale_2SC)))
            for end, place in places.items()
        }

    def forget(self) -> None:
        """Start anew with other lasting projections."""
        self.renewal.forget()

    def seeds(self, step: int, public_seed: int) -> dict[End, torch.Tensor]:
        """Per end of a pair int64 [1 + J, 2] on the device: sample and projection seed of each sketch, public first."""
        result = {}
        for end in self.ends:
            sample, *projections = self.step_seeds(end, step)
            if self.renewal.overlapping_X[self._place(end)]:
                projections.append(self._lasting(end, ahead=1))
            rows = [[public_seed, public_seed], *([sample, projection] for projection in projections)]
            result[end] = torch.tensor(rows, dtype=torch.int64).to(self._device, non_blocking=True)
        return result

    def step_seeds(self, end: End, step: int) -> tuple[int, int, int]:
        """Seeds of the secret sketches at an end: of the step's sample, its fresh projection, and the lasting one."""
        pair, direction = self._pairs[_side(end)], end[0]
        sample, fresh = (pair.number(purpose, direction, step) for purpose in ("sample", "fresh projection"))
        return sample, fresh, self._lasting(end)

    def to_keep(self, step: int, micro_batches: int) -> dict[End, int]:
        """Per end of a pair the micro-batch that both neighbours keep for an audit, where one can come to it."""
        return {
            end: self._pairs[_side(end)].number("keep", step) % micro_batches
            for end in self.ends
            if not self._mesh.neighbours_are_trusted(self._worker.stage + _side(end))
        }

    def swap(self, probe: Probe) -> dict[End, tuple[Sketches, Sketches]]:
        """What entered and left the neighbouring stages: {own end: (entering, leaving)}, [J, P * M, m, ...] each."""
        own = {side: [sketches_of(probe, end) for end in PAIR_ENDS[side]] for side in self._pairs}
        parts = {side: [_pack(sketches) for sketches in both] for side, both in own.items()}
        packed = {side: torch.cat(both) for side, both in parts.items()}
        theirs = {side: torch.empty_like(values) for side, values in packed.items()}
        operations = []
        for side, pair in self._pairs.items():
            operations.append(dist.P2POp(dist.isend, packed[side], pair.partner))
            operations.append(dist.P2POp(dist.irecv, theirs[side], pair.partner))
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        result = {}
        for side, both in own.items():
            # The partner packs the same directions in the same order, each at its own end of the stage.
            halves = theirs[side].split([part.numel() for part in parts[side]])
            for end, mine, half in zip(PAIR_ENDS[side], both, halves, strict=True):
                other = _unpack(half, mine)
                result[end] = (mine, other) if end[1] == SENT else (other, mine)
        return result

    def _lasting(self, end: End, ahead: int = 0) -> int:
        pair = self._pairs[_side(end)]
        return pair.number("lasting projection", end[0], int(self.renewal.epoch_X[self._place(end)]) + ahead)

    def _place(self, end: End) -> tuple[int, int, int]:
        """Direction, the stage between, and the column."""
        return (end[0], *self._pairs[_side(end)].names[2:])


def sketches_of(probe: Probe, end: End) -> Sketches:
    """All secret ones; they are of the same sample, and so are their norms."""
    sketch_JMmK, norms_JMm = probe.sketches(end, slice(SECRET, None))
    return Sketches(sketch_JMmK, norms_JMm[0], probe.token_counts(end))


def _pack(sketches: Sketches) -> torch.Tensor:
    assert sketches.tokens_X is not None, "of the probe"
    return torch.cat([sketches.sketch_JXmK.flatten(), sketches.norms_Xm.flatten(), sketches.tokens_X])


def _unpack(packed_N: torch.Tensor, like: Sketches) -> Sketches:
    """What a partner sent, its numbers finite as honest ones are: NaN would say "not available", and accuse nobody."""
    finite_N = packed_N.nan_to_num(0.0, 0.0, 0.0)
    shapes = like.sketch_JXmK.shape, like.norms_Xm.shape, like.norms_Xm.shape[:1]
    parts = finite_N.split([shape.numel() for shape in shapes])
    return Sketches(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


def _side(end: End) -> int:
    return ABOVE if end in PAIR_ENDS[ABOVE] else BELOW
