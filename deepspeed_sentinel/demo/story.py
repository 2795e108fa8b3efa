"""What Sentinel did, for the demo's terminal: short lines, in the order in which things happen in a step.

    DEALT ANEW -> TWIN STEP -> ALARM or DISPUTE -> LEFT OUT -> SUSPECT -> PROVED or UNDECIDED -> CLEARED -> CONVICTED
    -> RELEASED -> SKIPPED

What a convicted worker goes on doing is not told, nor is a column that stays left out. The log of the job has all of
it, with numbers, hosts and devices: ``engine/story.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np

from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import DIRECTIONS, NAMED, Worker, columns_of, workers_of
from deepspeed_sentinel.telemetry.exclusion import proved
from deepspeed_sentinel.telemetry.suspicion import suspicion

_AFTERWARDS = {"quarantine": ": its column stays out, training goes on"}


class Story:
    """Tells one step after the other."""

    def __init__(self) -> None:
        self._suspects = self._convicted = np.zeros((0, 0), bool)
        self._out: list[int] = []
        self._wiring: np.ndarray | None = None

    def step(self, verdict: Verdict, wiring: np.ndarray) -> list[str]:
        """Its lines.

        Args:
            verdict: of the step.
            wiring: int64 [S, C], by which its messages went.
        """
        if self._wiring is None:
            self._wiring = wiring
            self._suspects = self._convicted = np.zeros_like(verdict.suspects)
        lines = [NAMED.sub(r"stage \1 replica \2", line) for line in self._lines(verdict, wiring)]
        self._wiring, self._out = wiring.copy(), np.flatnonzero(verdict.excluded).tolist()
        self._suspects, self._convicted = verdict.suspects.copy(), verdict.convicted.copy()
        return lines

    def _lines(self, verdict: Verdict, wiring: np.ndarray) -> Iterator[str]:
        if moves := _moves(self._wiring, wiring):
            yield f"DEALT ANEW {moves}"
        if verdict.twins:
            yield "TWIN STEP: all columns get the same data and are compared"
        scores: dict[Worker, float] = {}
        for finding in verdict.findings:
            if self._is_news(finding.worker):
                scores[finding.worker] = max(finding.score, scores.get(finding.worker, 0.0))
        if scores:
            told = ", ".join(f"{worker} score {_score(score)}" for worker, score in scores.items())
            yield f"ALARM {told} (fence at 1)"
        for dispute in verdict.disputed:
            if self._is_news(dispute.sender) and self._is_news(dispute.receiver):
                yield f"DISPUTE {dispute.sender} and {dispute.receiver} report different things"
        yield from self._left_out(verdict)
        for worker in workers_of(verdict.suspects & ~self._suspects):
            yield f"SUSPECT {worker}: {suspicion(verdict, worker)}"
        for proof in verdict.proofs:
            if self._is_news(proof.worker):
                what = "gradients" if proof.direction is None else f"{DIRECTIONS[proof.direction]} messages"
                yield f"PROVED {proof.worker}: other {what} than {proof.agreeing} of {proof.compared} given the same"
        for one in verdict.contradicted:
            if self._is_news(one.worker):
                yield f"PROVED {one.worker}: at odds with {_listed(one.partners)}, more than can be bad"
        for difference in verdict.differences:
            if not any(worker in verdict.newly_convicted for worker in difference.workers):
                yield f"UNDECIDED {_listed(difference.workers)}: other work on the same, and no majority"
        for worker in verdict.cleared:
            yield f"CLEARED {worker}: given the same, it does what its stage does"
        for worker in verdict.newly_convicted:
            how = "proved" if proved(verdict, worker) else "by its strikes, without proof"
            yield f"CONVICTED {worker}, {how}{_AFTERWARDS.get(verdict.action, '')}"
        for worker in verdict.released:
            yield f"RELEASED {worker}, on probation"
        if verdict.skip:
            every = "every column is left out" if verdict.excluded.all() else "not every message could be judged"
            yield f"SKIPPED, no weight changes: {every}"

    def _is_news(self, worker: Worker) -> bool:
        return not self._convicted[worker]

    def _left_out(self, verdict: Verdict) -> Iterator[str]:
        out, left = (np.flatnonzero(which).tolist() for which in (verdict.excluded, ~verdict.excluded))
        if out == self._out:
            return
        if not out:
            yield "ALL COLUMNS COUNT again"
        else:
            rest = f"; {_columns(left)} {'go' if len(left) > 1 else 'goes'} on" if left else ""
            yield f"LEFT OUT of the weights: {_columns(out)}{rest}"


def _moves(before: np.ndarray | None, wiring: np.ndarray) -> str:
    """Who serves another column than before, stage by stage."""
    if before is None or np.array_equal(before, wiring):
        return ""
    moved, now = workers_of(columns_of(before) != columns_of(wiring)), columns_of(wiring)
    return "; ".join(
        f"stage {stage}: " + ", ".join(f"replica {one.replica} to column {now[one]}" for one in workers)
        for stage, workers in groupby(moved, lambda worker: worker.stage)
    )


def _score(score: float) -> str:
    return f"{score:.3g}" if score < 1000 else "over 999"


def _columns(which: list[int]) -> str:
    return f"column{'s'[: len(which) > 1]} {', '.join(map(str, which))}"


def _listed(workers: Iterable[Worker]) -> str:
    return " and ".join(map(str, workers))
