"""The account of a judged step: what its arrays say about workers, for the verdict and for the record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from deepspeed_sentinel.evidence.table import Rows
from deepspeed_sentinel.judgement.blame import Blame
from deepspeed_sentinel.judgement.excuses import Judged
from deepspeed_sentinel.judgement.fences import Fences
from deepspeed_sentinel.judgement.grounds import grounds
from deepspeed_sentinel.judgement.verdict import Dispute, Finding
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker


class Account:
    """Names workers in the arrays of one step.

    Args:
        mesh: the mesh judged.
        served: int [S, C], who served each column.
        table: the rows judged.
    """

    def __init__(self, mesh: Mesh, served: np.ndarray, table: Rows) -> None:
        self._mesh = mesh
        self._served = served
        self._table = table

    def worker_scores(self, scores: np.ndarray) -> np.ndarray:
        """float64 [S, R], the largest score (of [2, L, C, M]) of what each worker sent."""
        per_link = np.maximum.reduce(scores, axis=3)
        by_column, result = np.zeros((2, self._mesh.stages, self._mesh.replicas))
        by_column[:-1] = per_link[FORWARD]
        by_column[1:] = np.maximum(by_column[1:], per_link[BACKWARD])
        result[np.arange(self._mesh.stages)[:, None], self._served] = by_column
        return result

    def findings(self, blame: Blame, judged: Judged, fences: Fences) -> tuple[Finding, ...]:
        """One finding a link and column with messages that are named, what strikes first and the worst first."""
        if not blame.named.any():
            return ()
        findings = [
            self._finding((direction, link, column), blame, judged, fences)
            for direction, link, column in np.argwhere(blame.named.any(3)).tolist()
        ]
        return tuple(sorted(findings, key=lambda finding: (not finding.strikes, -finding.score, finding.worker)))

    def _finding(self, where: tuple[int, int, int], blame: Blame, judged: Judged, fences: Fences) -> Finding:
        direction, link, column = where
        micro_batches = np.flatnonzero(blame.named[where])
        striking = np.flatnonzero(blame.strikes[where])
        telling = striking if striking.size else micro_batches
        by_statistic_KM, fenced_KM = (rows[(slice(None), *where)] for rows in (judged.per_statistic, judged.fenced))
        own_B, fenced_B = (rows.max(0)[telling] for rows in (by_statistic_KM[~self._table.of_pair], fenced_KM))
        why = grounds(own_B, fenced_B, judged.but_for_pair[where][telling], telling)
        worst = int(telling[np.argmax(judged.scores[where][telling])])
        score = float(judged.scores[where][worst])
        statistic = int(np.argmax(by_statistic_KM[:, worst]))
        stage = self._mesh.sender_stage(direction, link)
        hard = bool(self._table.hard[statistic])
        low, high = (0.0, 0.0) if hard else fences.bounds(direction, link, statistic)
        of_pair = self._table.of_pair
        summed = of_pair[statistic] and fenced_KM[np.count_nonzero(of_pair[:statistic]), worst] <= 1.0
        return Finding(
            worker=self._worker(stage, column),
            direction=direction,
            link=link,
            column=column,
            micro_batches=tuple(micro_batches.tolist()),
            striking=tuple(striking.tolist()),
            micro_batch=worst,
            cause="later alarms" if score <= 1.0 else "sums" if summed else "fences",
            statistic=Rows.name(statistic),
            value=float(judged.values[(statistic, *where, worst)]),
            residual=float(judged.residuals[(statistic, *where, worst)]),
            low=low,
            high=high,
            score=score,
            trusted=self._mesh.is_trusted(stage),
            overflow=bool(judged.overflow[(*where, worst)]),
            rests_on_pair=why.rests_on_pair,
            telling=why.telling,
            part=Rows.part(statistic) if self._table.parts > 1 else None,
            excuse=self._excuse(statistic, judged, (*where, worst)),
            but_for_pair=why.rests_on_pair and bool(judged.but_for_pair[(*where, worst)]),
        )

    def _excuse(
        self, statistic: int, judged: Judged, message: tuple[int, int, int, int]
    ) -> Literal["", "content", "alone", "doubted", "turn"]:
        if self._mesh.replicas == 1 and not self._table.hard[statistic]:
            return "alone"
        if judged.content[message]:
            return "content"
        if judged.turn[message]:
            return "turn"
        return "doubted" if judged.doubted[message] else ""

    def disputes(self, first: np.ndarray, contradicted: np.ndarray) -> tuple[Dispute, ...]:
        """One dispute a link and column.

        Args:
            first: bool [2, L, C, M], disputed messages.
            contradicted: bool [2, L, C, M], those whose two ends report different things; of the others it is the
                sender's neighbours who do, where it has two.
        """
        disputes: list[Dispute] = []
        if not first.any():
            return ()
        for direction, link, column in np.argwhere(first.any(3)).tolist():
            where = (direction, link, column)
            sender, receiver = self._mesh.sender_stage(direction, link), self._mesh.receiver_stage(direction, link)
            about, before = None, 2 * sender - receiver
            if 0 <= before < self._mesh.stages and not (first & contradicted)[where].any():
                # The neighbours of the sender contradict each other, so it is between these two.
                about = self._worker(sender, column)
                sender = before
            disputes.append(
                Dispute(
                    direction=direction,
                    link=link,
                    column=column,
                    sender=self._worker(sender, column),
                    receiver=self._worker(receiver, column),
                    about=about,
                    micro_batches=tuple(np.flatnonzero(first[where]).tolist()),
                )
            )
        return tuple(disputes)

    def _worker(self, stage: int, column: int) -> Worker:
        return Worker(stage, int(self._served[stage, column]))


def entries(mesh: Mesh, findings: Iterable[Finding], disputes: Iterable[Dispute]) -> tuple[np.ndarray, np.ndarray]:
    """For the record: strikes, bool [S, R], and disputed links, bool [L, C]."""
    struck = np.zeros((mesh.stages, mesh.replicas), bool)
    disputed = np.zeros((mesh.links, mesh.replicas), bool)
    for finding in findings:
        if finding.strikes:
            struck[finding.worker] = True
    for dispute in disputes:
        disputed[dispute.link, dispute.column] = True
        if dispute.struck is not None:
            struck[dispute.struck] = True
    return struck, disputed
