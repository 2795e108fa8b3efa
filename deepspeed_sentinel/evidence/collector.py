"""From the messages of a step to its evidence: the probe while they pass, then one swap and one all-gather."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.evidence.exchange import Exchange, Place, build_report
from deepspeed_sentinel.evidence.keeping import Keeping
from deepspeed_sentinel.evidence.parts import Layout, agree
from deepspeed_sentinel.evidence.probe import ENDS, End, EndStatistics, Probe
from deepspeed_sentinel.evidence.sketch import PairSketches
from deepspeed_sentinel.evidence.statement import Statement
from deepspeed_sentinel.evidence.table import RECEIVED, SENT, Evidence
from deepspeed_sentinel.evidence.transfer import Sketches, Transfers
from deepspeed_sentinel.kernels.token_sketch import sketch_rows
from deepspeed_sentinel.mesh import BACKWARD, DIRECTIONS, FORWARD, Mesh, Worker

PUBLIC_SEED = 0  # everybody may know it: it has to serve both ends of every link


class Collector:
    """What one worker sees, keeps and shares. Building, collecting and learning are collective.

    Attributes:
        probe: reads the messages.
        keeping: keeps those that an audit may ask for.
        layout: what messages are made of, agreed on in the first step; None before.

    Args:
        mesh, worker: the mesh and this worker.
        ranks: int [S, R], the global rank of each worker.
        replica_group: process group of this stage's replicas, in replica order.
        control: group on the CPU over which secrets travel.
        device: where messages live.
        decays: EMA decays of activations and gradients.
        seed: of the secrets, or None; see ``PairSketches``.
    """

    def __init__(
        self,
        mesh: Mesh,
        worker: Worker,
        ranks: np.ndarray,
        *,
        replica_group: dist.ProcessGroup,
        control: dist.ProcessGroup,
        device: torch.device,
        decays: tuple[float, float],
        seed: int | None,
    ) -> None:
        self._mesh, self._ranks, self._control = mesh, ranks, control
        self._device = device
        self._decays = decays
        self.layout: Layout | None = None
        self.probe = Probe(mesh, worker.stage, device, PUBLIC_SEED)
        self.keeping = Keeping()
        self._step = 0
        self._pairs = PairSketches(mesh, worker, ranks, device, seed, control)
        self._exchange = Exchange(mesh, ranks, replica_group)
        self._statistics: dict[Place, EndStatistics] = {}
        self._lessons: dict[Place, torch.Tensor] = {}
        self._told: frozenset[Place] = frozenset()
        self.reset()

    def reset(self) -> None:
        """Forget what was learnt."""
        self._baselines: dict[int, Baselines] = defaultdict(lambda: Baselines(*self._decays))
        self._transfers: dict[int, Transfers] = defaultdict(lambda: Transfers(*self._decays))

    def begin_step(self, step: int, micro_batches: int) -> None:
        self._step = step
        self.probe.begin_step(micro_batches, self._pairs.seeds(step, PUBLIC_SEED))
        self.keeping.begin_step(self._pairs.to_keep(step, micro_batches))

    def collect(self, step: int, gradient_scale: float) -> Evidence:
        """All ranks' evidence of the step; ``gradient_scale`` undoes accumulation and loss scaling."""
        if self.layout is None:
            seen = [self.probe.seen(end) for end in ENDS]
            self.layout = agree(seen, self._mesh, self._ranks, ENDS, self._control)
            self.probe.adopt(self.layout)
        self._statistics = {
            (end, part): self.probe.end_statistics(end, gradient_scale if end[0] == BACKWARD else 1.0, part)
            for end in self.probe.ends
            for part in self.probe.parts(end)
        }
        own_rows = {
            (end, part): torch.cat([self._baselines[part].distances(end, rows), rows.scalars_M3], dim=1)
            for (end, part), rows in self._statistics.items()
        }
        pair_rows: dict[Place, torch.Tensor] = {}
        for end, (entering, leaving) in self._pairs.swap(self.probe).items():
            for part in self.probe.parts(end):
                place = (end, part)
                pair_rows[place], self._lessons[place] = self._transfer(place, entering, leaving)
        digests = {end: self.probe.digests(end) for end in self.probe.ends}
        report = build_report(self.probe.micro_batches, self.layout, own_rows, pair_rows, digests)
        return self._exchange.gather_reports(report, step, self.layout)

    def not_judged(self) -> str:
        """What of the messages that this stage sends forward is compared by checksum alone.

        Empty if nothing is, or no more than in what it received, which the stage before tells of.
        """
        assert self.layout is not None, "nothing was collected yet"
        sent, received = (
            self._left((FORWARD, role)) if (FORWARD, role) in self.probe.ends else [] for role in (SENT, RECEIVED)
        )
        if not sent or sent == received:
            return ""
        return (
            f"messages from link {self.probe.link((FORWARD, SENT))} on: not judged {'is' if len(sent) == 1 else 'are'} "
            f"{', '.join(sent)}, only compared by checksum, at both ends of a link and across stages that pass them on"
        )

    def _left(self, end: End) -> list[str]:
        kinds, judged = self.probe.kinds[end], self.probe.judged(end)
        return [f"tensor {index} ({kind})" for index, kind in enumerate(kinds) if index not in judged]

    def changed(self) -> list[str]:
        """What this stage sent of another hidden size than was agreed on, each told once."""
        new = sorted((end, part) for end, part in self.probe.changed - self._told if end[1] == SENT)
        self._told |= self.probe.changed
        return [
            f"{DIRECTIONS[end[0]]} messages over link {self.probe.link(end)}: part {part} changes its hidden size, so "
            "messages in which it differs from the first step's are not judged by it"
            for end, part in new
        ]

    def testify(self, end: End) -> Statement:
        """For an audit, between ``collect`` and ``learn``: what this worker kept at an end, and how it looked at it."""
        assert self.layout is not None, "nothing was collected yet"
        micro_batch, tensors = self.keeping.kept(end)
        known = tuple(self._transfers[part].known(end) for part in range(self.layout.parts))
        return Statement(micro_batch, self._pairs.step_seeds(end, self._step), known, tensors)

    def learn(self, clean: np.ndarray) -> None:
        """Learn from the step's clean columns, bool [C]; one gather among the replicas of a stage."""
        summaries = [self._baselines[part].summary(end, rows) for (end, part), rows in self._statistics.items()]
        lessons = list(self._lessons.values())
        if not summaries:
            return
        gathered = self._exchange.gather_summaries(torch.cat([*summaries, *lessons]))
        shares = gathered.split([share.numel() for share in (*summaries, *lessons)], dim=1)
        for (end, part), share in zip(self._statistics, shares, strict=False):
            self._baselines[part].learn(end, share, clean)
        for (end, part), share in zip(self._lessons, shares[len(summaries) :], strict=True):
            self._transfers[part].learn(end, share, clean)

    def state_dict(self) -> dict[str, Any]:
        """What later evidence depends on; the same on all replicas of a stage."""
        return {
            "baselines": {str(part): one.state_dict() for part, one in self._baselines.items()},
            "transfers": {str(part): one.state_dict() for part, one in self._transfers.items()},
            "projections": self._pairs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        for part, of_part in state["baselines"].items():
            self._baselines[int(part)].load_state_dict(of_part, self._device)
        for part, of_part in state["transfers"].items():
            self._transfers[int(part)].load_state_dict(of_part, self._device)
        self._pairs.load_state_dict(state["projections"])

    def _transfer(self, place: Place, entering: Sketches, leaving: Sketches) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [M, PAIR_ROWS] of one part and this replica's lesson [V]; messages with equally many tokens together.

        Where the stage between changed the number of tokens, the two sketches are not of the same ones: NaN.
        """
        (end, part), transfers = place, self._transfers[place[1]]
        entering, leaving = (one.part(part, self.probe.micro_batches) for one in (entering, leaving))
        rows = [sketch_rows(tokens) for tokens in self.probe.tokens(end, part)]
        if len(set(rows)) == 1 and rows[0]:
            found, lessons = transfers.statistics(end, entering.first(rows[0]), leaving.first(rows[0]))
        else:
            each = [
                transfers.statistics(
                    end, entering.of(index).first(max(count, 1)), leaving.of(index).first(max(count, 1))
                )
                for index, count in enumerate(rows)
            ]
            found, lessons = (torch.cat(parts) for parts in zip(*each, strict=True))
        assert entering.tokens_X is not None and leaving.tokens_X is not None
        known_M = (entering.tokens_X == leaving.tokens_X) & (entering.tokens_X > 0)
        teaches_M = known_M & (entering.norms_Xm.amax(-1) > 0) & (leaving.norms_Xm.amax(-1) > 0)
        lesson_V = torch.where(teaches_M[:, None], lessons, 0.0).sum(0) / teaches_M.sum().clamp_min(1)
        return torch.where(known_M[:, None], found, torch.nan), lesson_V
