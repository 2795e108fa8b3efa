"""How audits are held: the neighbours send the auditor what they kept, and all ranks learn what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence.keeping import Statement
from deepspeed_sentinel.evidence.parts import Layout
from deepspeed_sentinel.evidence.probe import End
from deepspeed_sentinel.evidence.table import Evidence
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.response.audit import Audit, Outcome, examine

PATIENCE_SECONDS = 120.0
_OUTCOMES = tuple(Outcome)


class Hearing:
    """Holds the audits of a step, on every rank together.

    Args:
        worker: this worker.
        ranks: int [S, R], the global rank of each worker.
        control: group of all ranks on the CPU, over which everything travels.
        device: where this worker computes.
        testify: what this worker kept at an end.
    """

    def __init__(
        self,
        worker: Worker,
        ranks: np.ndarray,
        control: dist.ProcessGroup,
        device: torch.device,
        testify: Callable[[End], Statement],
    ) -> None:
        self._worker = worker
        self._ranks = ranks
        self._control = control
        self._device = device
        self._testify = testify

    def hold(self, audits: Sequence[Audit], evidence: Evidence, layout: Layout) -> tuple[Outcome, ...]:
        """What each audit found: the same on all ranks. All must call it with the same audits in the same order.

        Args:
            audits: those of the step.
            evidence: of the step.
            layout: what messages are made of.

        Raises:
            SentinelError: a witness sent nothing, or an auditor no outcome.
        """
        mine = torch.zeros(len(audits), dtype=torch.int64)
        for index, audit in enumerate(audits):
            outcome = self._take_part(audit, evidence, layout)
            if outcome is not None:
                mine[index] = 1 + _OUTCOMES.index(outcome)
        everyone = torch.empty(self._ranks.size * len(audits), dtype=mine.dtype)
        dist.all_gather_single(everyone, mine, group=self._control)
        told = everyone.view(self._ranks.size, len(audits))
        return tuple(self._outcome_of(audit, int(told[self._rank(audit.auditor), i])) for i, audit in enumerate(audits))

    def _take_part(self, audit: Audit, evidence: Evidence, layout: Layout) -> Outcome | None:
        if self._worker == audit.auditor:
            first, second = (self._hear(witness, end) for witness, end in audit.witnesses)
            return examine(audit, evidence, first, second, layout, self._device)
        for witness, end in audit.witnesses:
            if self._worker == witness:
                data_N = self._testify(end).to_bytes()
                for part in (torch.tensor([data_N.numel()]), data_N):
                    dist.send(part, dst=self._rank(audit.auditor), group=self._control)
        return None

    def _hear(self, witness: Worker, end: End) -> Statement:
        if witness == self._worker:
            return self._testify(end)
        size = self._receive(torch.empty(1, dtype=torch.int64), witness)
        data_N = self._receive(torch.empty(int(size), dtype=torch.uint8), witness)
        return Statement.from_bytes(data_N, self._device)

    def _receive(self, into: torch.Tensor, witness: Worker) -> torch.Tensor:
        request = dist.irecv(into, src=self._rank(witness), group=self._control)
        assert request is not None
        try:
            request.wait(timedelta(seconds=PATIENCE_SECONDS))
        except RuntimeError as error:
            if "timed out" not in str(error).lower():
                raise
            raise SentinelError(
                f"{witness} did not send what it kept for an audit within {PATIENCE_SECONDS:g} seconds. Resume from "
                "the last checkpoint without it."
            ) from error
        return into

    def _rank(self, worker: Worker) -> int:
        return int(self._ranks[worker])

    @staticmethod
    def _outcome_of(audit: Audit, told: int) -> Outcome:
        if not 1 <= told <= len(_OUTCOMES):
            raise SentinelError(f"{audit.auditor} gave no outcome of its audit of {audit.finding.worker}: {told}")
        return _OUTCOMES[told - 1]
