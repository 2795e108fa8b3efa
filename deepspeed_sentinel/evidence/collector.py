"""From the messages of a step to its evidence: the probe while they pass, then one swap and one all-gather."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.evidence.buffers import EndStatistics
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.exchange import Exchange, Place, build_report
from deepspeed_sentinel.evidence.keeping import Keeping
from deepspeed_sentinel.evidence.keys import Keys
from deepspeed_sentinel.evidence.parts import Layout, agree
from deepspeed_sentinel.evidence.probe import ENDS, End, Probe
from deepspeed_sentinel.evidence.sketch import PairSketches
from deepspeed_sentinel.evidence.stage_secret import digest_keys, stage_secret
from deepspeed_sentinel.evidence.statement import Statement
from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import NAMES, RECEIVED, SENT, TABLE
from deepspeed_sentinel.evidence.transfer import LASTING, Known, Sketches, Transfers, pair_rows
from deepspeed_sentinel.kernels.token_sketch import sketch_rows
from deepspeed_sentinel.mesh import BACKWARD, DIRECTIONS, FORWARD, Mesh, Worker, columns_of, identity

_MAX_ABS = NAMES.index("max_abs")
PUBLIC_SEED = 0  # everybody may know it: it has to serve both ends of every link


class Collector:
    """What one worker sees, keeps and shares. Building, collecting and learning are collective.

    Attributes:
        probe: reads the messages.
        keeping: keeps those that an audit may ask for.
        layout: what messages are made of, agreed on in the first step; None before.
        keys: what this worker shares with any other one.
        secret: what this stage's workers share.
        complaint: 1 + the replica of this stage that gave a summary which cannot be one of its clean messages, in the
            step before the one whose evidence was collected last; 0 for none.

    Args:
        mesh, worker: the mesh and this worker.
        ranks: int [S, R], the global rank of each worker.
        replica_group: process group of this stage's replicas, in replica order.
        control: gathers of all ranks on the CPU.
        device: where messages live.
        decays: EMA decays of activations and gradients.
        seed: of the secrets, or None; see ``Keys``.
        lenient: leave out messages that cannot be judged, instead of raising.
    """

    def __init__(
        self,
        mesh: Mesh,
        worker: Worker,
        ranks: np.ndarray,
        *,
        replica_group: dist.ProcessGroup,
        control: Control,
        device: torch.device,
        decays: tuple[float, float],
        seed: int | None,
        lenient: bool = False,
    ) -> None:
        self._mesh, self._ranks, self._control = mesh, ranks, control
        self._device = device
        self._worker = worker
        self._decays = decays
        self.layout: Layout | None = None
        self.probe = Probe(mesh, worker.stage, device, PUBLIC_SEED, lenient)
        self.keeping = Keeping()
        self._step = 0
        self.keys = Keys.exchange(seed, control)
        self.secret = stage_secret(worker, ranks, self.keys, control, seed)
        self._collected = 0
        # NCCL wants all ranks in the first operation of a group, and a step's first is between neighbours.
        dist.all_reduce(torch.zeros(1, device=device))
        self._pairs = PairSketches(mesh, worker, ranks, device, self.keys)
        self._exchange = Exchange(mesh, ranks, replica_group)
        self._evidence: Evidence | None = None
        self._misfits = torch.zeros(mesh.replicas, dtype=torch.bool, pin_memory=device.type == "cuda")
        self.complaint = 0
        self._statistics: dict[Place, EndStatistics] = {}
        self._lessons_JV: dict[Place, torch.Tensor] = {}
        self._told: frozenset[Place] = frozenset()
        self._wiring = identity(mesh)
        self.reset()

    def wire(self, wiring: np.ndarray) -> None:
        """Go by another wiring, int64 [S, C], from the next step on."""
        stale = self._pairs.wire(wiring)
        self._wiring = wiring
        for end, of_end in stale.items():
            for transfers in self._transfers.values():
                transfers.renew(end, np.zeros_like(of_end), of_end)

    def reset(self) -> None:
        """Forget what was learnt, and draw other lasting projections."""
        self._baselines: dict[int, Baselines] = defaultdict(lambda: Baselines(*self._decays))
        self._transfers: dict[int, Transfers] = defaultdict(lambda: Transfers(*self._decays))
        self._pairs.forget()

    def begin_step(self, step: int, micro_batches: int, keyed: bool) -> None:
        """Before a step's first message; again before the same step's, if it is run twice.

        Args:
            step: the engine's global step.
            micro_batches: messages at each end.
            keyed: take keyed digests of what is received, since replicas may be held against each other.
        """
        self._step = step
        ends = [end for end in self.probe.ends if keyed and end[1] == RECEIVED]
        keys = {
            end: digest_keys(self.secret, end[0], step, self._collected).to(self._device, non_blocking=True)
            for end in ends
        }
        self.probe.begin_step(micro_batches, self._pairs.seeds(step, PUBLIC_SEED), keys)
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
        rows_of_pairs: dict[Place, torch.Tensor] = {}
        for end, (entering, leaving) in self._pairs.swap(self.probe).items():
            for part in self.probe.parts(end):
                place = (end, part)
                rows_of_pairs[place], self._lessons_JV[place] = self._transfer(place, entering, leaving)
        digests = {end: self.probe.digests(end) for end in self.probe.ends}
        keyed = {end: self.probe.keyed(end) for end in self.probe.ends if end[1] == RECEIVED}
        report = build_report(self.probe.micro_batches, self.layout, own_rows, rows_of_pairs, digests, keyed)
        self._collected += 1
        gathered = self._exchange.gather_reports(report, step, self.layout, self._wiring)
        self._evidence = replace(gathered, renewed=self._pairs.renewal.new_X)
        # The copy that ``learn`` began in the step before was over before that of the reports began.
        misfits = self._misfits.nonzero().flatten().tolist()
        self.complaint = 1 + misfits[0] if misfits else 0
        self._misfits.zero_()
        return self._evidence

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
        known = tuple(self._known(end, part) for part in range(self.layout.parts))
        return Statement(micro_batch, self._pairs.step_seeds(end, self._step), known, tensors)

    def learn(self, clean: np.ndarray) -> None:
        """Learn from the step's clean messages, bool [2, L, C]; one gather among the replicas of a stage."""
        summaries = [self._baselines[part].summary(end, rows) for (end, part), rows in self._statistics.items()]
        if summaries:
            gathered = self._exchange.gather_summaries(torch.cat(summaries))
            shares = gathered.split([share.numel() for share in summaries], dim=1)
            misfits = [
                self._baselines[part].learn(end, share, self._at(end, clean), self._largest(end, part))
                for (end, part), share in zip(self._statistics, shares, strict=True)
            ]
            self._misfits.copy_(torch.stack(misfits).any(0), non_blocking=True)
        changes = self._pairs.learn(clean)
        for (end, part), lessons_JV in self._lessons_JV.items():
            for which, lesson_V in enumerate(lessons_JV, LASTING):
                self._transfers[part].learn(end, lesson_V, changes[end].clean, which)
        for end, change in changes.items():
            for transfers in self._transfers.values():
                transfers.renew(end, change.renewed, change.stale)

    def state_dict(self) -> dict[str, Any]:
        """What later evidence depends on; the same on all replicas of a stage, and nothing of it secret.

        What was learnt of pairs is not in it: it would be of no use without the projection, and with it of use to
        whoever reads the file.
        """
        return {"baselines": {str(part): one.state_dict() for part, one in self._baselines.items()}}

    def load_state_dict(self, state: dict[str, Any], without: Collection[tuple[int, int]] = ()) -> None:
        """Take a state over, but for the baselines of some directions and links, which both their ends must leave."""
        self.reset()
        ends = tuple(end for end in self.probe.ends if (end[0], self.probe.link(end)) in without)
        for part, of_part in state["baselines"].items():
            self._baselines[int(part)].load_state_dict(of_part, self._device, ends)

    def spoilt_links(self, state: dict[str, Any]) -> tuple[tuple[int, int], ...]:
        """Directions and links of which a state holds baselines that are not finite."""
        ends = {end for of_part in state["baselines"].values() for end in Baselines.spoilt(of_part)}
        return tuple((end[0], self.probe.link(end)) for end in sorted(ends))

    def _at(self, end: End, of_links: np.ndarray) -> np.ndarray:
        """What is said of the messages at an end of each replica of this stage: of [2, L, C], [R]."""
        return self._by_replica(of_links[end[0], self.probe.link(end)])

    def _by_replica(self, of_columns: np.ndarray) -> np.ndarray:
        """[C] -> [R]: of the column that each replica of this stage serves."""
        return np.ascontiguousarray(of_columns[columns_of(self._wiring)[self._worker.stage]])

    def _known(self, end: End, part: int) -> Known | None:
        return self._transfers[part].known(end) if self._pairs.ready(end) else None

    def _largest(self, end: End, part: int) -> np.ndarray:
        """float64 [replicas], the largest magnitude at an end by each replica's report; NaN counts as none."""
        assert self._evidence is not None, "nothing was collected yet"
        reported_CMV = self._evidence.statistics[end[1], end[0], self.probe.link(end)]
        largest_C = np.nan_to_num(reported_CMV[..., part * len(TABLE) + _MAX_ABS].astype(np.float64)).max(-1)
        return self._by_replica(largest_C)

    def _transfer(self, place: Place, entering: Sketches, leaving: Sketches) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [M, PAIR_ROWS] of one part and this column's lessons [J - 1, LESSON]; messages with equally many tokens
        together.

        Where the stage between changed the number of tokens, the two sketches are not of the same ones: NaN.
        """
        (end, part), known = place, self._known(*place)
        entering, leaving = (one.part(part, self.probe.micro_batches) for one in (entering, leaving))
        rows = [sketch_rows(tokens) for tokens in self.probe.tokens(end, part)]
        if len(set(rows)) == 1 and rows[0]:
            found, lessons = pair_rows(entering.first(rows[0]), leaving.first(rows[0]), known)
        else:
            each = [
                pair_rows(entering.of(index).first(max(count, 1)), leaving.of(index).first(max(count, 1)), known)
                for index, count in enumerate(rows)
            ]
            found = torch.cat([one for one, _ in each])
            lessons = torch.cat([one for _, one in each], dim=1)
        assert entering.tokens_X is not None and leaving.tokens_X is not None, "of the probe"
        known_M = (entering.tokens_X == leaving.tokens_X) & (entering.tokens_X > 0)
        teaches_M = known_M & (entering.norms_Xm.amax(-1) > 0) & (leaving.norms_Xm.amax(-1) > 0)
        # Without a message that teaches anything it is NaN, and nothing is learnt.
        lessons_JV = torch.where(teaches_M[:, None], lessons, 0.0).sum(1) / teaches_M.sum()
        return torch.where(known_M[:, None], found, torch.nan), lessons_JV
