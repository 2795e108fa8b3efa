"""From the messages of a step to its evidence: the probe while they pass, then one swap and one all-gather."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.evidence.exchange import Exchange, build_report
from deepspeed_sentinel.evidence.keeping import Keeping, Statement
from deepspeed_sentinel.evidence.probe import End, EndStatistics, Probe
from deepspeed_sentinel.evidence.sketch import PairSketches
from deepspeed_sentinel.evidence.table import Evidence
from deepspeed_sentinel.evidence.transfer import Sketches, Transfers
from deepspeed_sentinel.mesh import BACKWARD, Mesh, Worker

PUBLIC_SEED = 0  # everybody may know it: it has to serve both ends of every link


class Collector:
    """What one worker sees, keeps and shares. Building, collecting and learning are collective.

    Attributes:
        probe: reads the messages.
        keeping: keeps those that an audit may ask for.

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
        self._device = device
        self._decays = decays
        self.probe = Probe(mesh, worker.stage, device, PUBLIC_SEED)
        self.keeping = Keeping()
        self._step = 0
        self._pairs = PairSketches(mesh, worker, ranks, device, seed, control)
        self._exchange = Exchange(mesh, ranks, replica_group)
        self._statistics: dict[End, EndStatistics] = {}
        self._lessons: dict[End, torch.Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was learnt."""
        self._baselines, self._transfers = Baselines(*self._decays), Transfers(*self._decays)

    def begin_step(self, step: int, micro_batches: int) -> None:
        self._step = step
        self.probe.begin_step(micro_batches, self._pairs.seeds(step, PUBLIC_SEED))
        self.keeping.begin_step(self._pairs.to_keep(step, micro_batches))

    def collect(self, step: int, gradient_scale: float) -> Evidence:
        """All ranks' evidence of the step; ``gradient_scale`` undoes accumulation and loss scaling."""
        self._statistics = {
            end: self.probe.end_statistics(end, gradient_scale if end[0] == BACKWARD else 1.0)
            for end in self.probe.ends
        }
        pair_rows: dict[End, torch.Tensor] = {}
        for end, (entering, leaving) in self._pairs.swap(self.probe).items():
            pair_rows[end], self._lessons[end] = self._transfer(end, entering, leaving)
        report = build_report(self.probe.micro_batches, self._baselines, self._statistics, pair_rows)
        return self._exchange.gather_reports(report, step)

    def testify(self, end: End) -> Statement:
        """For an audit, between ``collect`` and ``learn``: what this worker kept at an end, and how it looked at it."""
        micro_batch, tensors = self.keeping.kept(end)
        return Statement(micro_batch, self._pairs.step_seeds(end, self._step), self._transfers.known(end), tensors)

    def learn(self, clean: np.ndarray) -> None:
        """Learn from the step's clean columns, bool [C]; one gather among the replicas of a stage."""
        summaries = [self._baselines.summary(rows) for rows in self._statistics.values()]
        lessons = list(self._lessons.values())
        gathered = self._exchange.gather_summaries(torch.cat([*summaries, *lessons]))
        parts = gathered.split([part.numel() for part in (*summaries, *lessons)], dim=1)
        for end, part in zip(self._statistics, parts, strict=False):
            self._baselines.learn(end, part, clean)
        for end, part in zip(self._lessons, parts[len(summaries) :], strict=True):
            self._transfers.learn(end, part, clean)

    def state_dict(self) -> dict[str, Any]:
        """What later evidence depends on; the same on all replicas of a stage."""
        return {
            "baselines": self._baselines.state_dict(),
            "transfers": self._transfers.state_dict(),
            "projections": self._pairs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._baselines.load_state_dict(state["baselines"], self._device)
        self._transfers.load_state_dict(state["transfers"], self._device)
        self._pairs.load_state_dict(state["projections"])

    def _transfer(self, end: End, entering: Sketches, leaving: Sketches) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [M, PAIR_ROWS] and this replica's lesson [V]; messages with equally many tokens together."""
        rows = self.probe.sketched_rows(end)
        if len(set(rows)) == 1:
            found, lessons = self._transfers.statistics(end, entering.first(rows[0]), leaving.first(rows[0]))
            return found, lessons.mean(0)
        each = [
            self._transfers.statistics(end, entering.of(index).first(count), leaving.of(index).first(count))
            for index, count in enumerate(rows)
        ]
        return torch.cat([found for found, _ in each]), torch.cat([lesson for _, lesson in each]).mean(0)
