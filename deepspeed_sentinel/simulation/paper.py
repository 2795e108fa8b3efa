"""The published procedure of SENTINEL (arXiv 2603.03592), to be compared with this package's judge on equal terms.

Its full text is not at hand; this follows its abstract, public reviews and notes on it. Known: a trusted verifier at
every stage boundary; per boundary and direction an exponential moving average (EMA) of what honest workers send,
decay 0.9 for activations and 0.8 for gradients; four distances to it (``kernels/baseline_distances.py``); Tukey
fences on the inter-quartile range of recent distances, adapted while training runs, aiming at fewer than one false
alarm in a hundred messages; about 1,000 honest steps first; flagged messages do not enter the EMA; when a message is
flagged, verifiers downstream do not judge that micro-batch; workers that violate repeatedly are banned.

What we read into it, in its favour where there was a choice:
 * A message is flagged if any one of the four distances lies outside its own fence. The rate of false alarms is shared
   equally among them, and half of one in a hundred is aimed at, so that what comes of it stays below.
 * Fences have two sides, Q1 - k IQR and Q3 + k IQR: a message that is too close to the EMA is odd as well.
 * The quartiles are of the unflagged distances of the last ``WINDOW`` steps before, of the same boundary and direction,
   so fences follow training. k is the smallest from 1.5 on with which at most that share of the honest steps' distances
   would have been flagged, and stays: learnt anew from what is not flagged it would shrink without end, and from all it
   would make room for attackers.
 * The EMA takes the median over the replicas of their means over the micro-batches, one value a step, which no single
   unflagged attacker moves far. A plain mean would be weaker.
 * Banned is who was flagged in ``VIOLATIONS`` of ``WITHIN`` steps, for good.
 * Columns with banned workers are left out, and the columns are dealt so that these are few, as in all simulations.
 * The contaminated gradient: published is that the EMA takes its place. Here its column is left out of the step, which
   is kinder to training and changes nothing for detection, since that micro-batch is no longer judged either way.

Nothing compares replicas within a step, and nothing looks at pairs of what enters and leaves a stage.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import NAMES, RECEIVED
from deepspeed_sentinel.judgement.blame import followers
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.judgement.record import Record
from deepspeed_sentinel.judgement.robust import quantiles
from deepspeed_sentinel.judgement.verdict import Finding, Verdict
from deepspeed_sentinel.kernels.baseline_distances import DISTANCES
from deepspeed_sentinel.mesh import Mesh, Worker

TARGET_RATE = 0.005
SMALLEST_MULTIPLIER = 1.5
WINDOW = 100
VIOLATIONS, WITHIN = 5, 20
_ROWS = [NAMES.index(name) for name in DISTANCES]
_FOR_GOOD = 1 << 60


class PaperJudge:
    """Judges successive steps as the paper does.

    Args:
        mesh: the mesh judged.
        honest_steps: steps whose messages are taken for honest: none of them is flagged.
        judged: which directions' messages are looked at.

    Attributes:
        judged: the same, bool [2].
        record: who is banned.
        clean_links: bool [2, L, C], whose messages of the last step enter the EMA of a boundary.
    """

    def __init__(self, mesh: Mesh, honest_steps: int, judged: tuple[bool, bool]) -> None:
        self.mesh = mesh
        self.record = Record(mesh, VIOLATIONS, WITHIN, _FOR_GOOD)
        self._honest_steps = honest_steps
        self.judged = np.array(judged)
        self._recent: np.ndarray | None = None
        self._honest: list[np.ndarray] = []
        self._multiplier = np.full((len(_ROWS), 2, mesh.links), np.nan)
        self._steps = 0
        self.clean_links = np.ones((2, mesh.links, mesh.replicas), bool)

    @property
    def doubts(self) -> Doubts:
        """Who is banned: nobody is tried."""
        nobody = np.zeros_like(self.record.convicted)
        return Doubts(self.record.convicted.copy(), nobody, nobody, nobody)

    def step(self, evidence: Evidence) -> Verdict:
        """Judge one step; what is not flagged is what the next ones are judged by."""
        distances = np.moveaxis(evidence.statistics[RECEIVED][..., _ROWS], -1, 0)
        warming_up = self._steps < self._honest_steps
        scores = np.zeros(distances.shape)
        if 2 * self._steps >= min(2 * WINDOW, self._honest_steps) or not warming_up:
            beyond = self._beyond(distances)
            if warming_up:
                self._honest.append(beyond)
            else:
                scores = np.where(self.judged[:, None, None, None], beyond / self._multiplier[..., None, None], 0.0)
        flagged = scores.max(0) > 1.0
        first = flagged & ~followers(flagged)
        unjudged = followers(first)
        struck = np.zeros((self.mesh.stages, self.mesh.replicas), bool)
        findings = tuple(self._findings(first, scores, distances, evidence.served))
        for finding in findings:
            struck[finding.worker] = True
        newly = self.record.update(struck, np.zeros((self.mesh.links, self.mesh.replicas), bool)).convicted
        clean = ~(first | unjudged)
        self._learn(np.where(clean, distances, np.nan))
        if warming_up and self._steps == self._honest_steps:
            self._choose_multiplier()
        self.clean_links = clean.all(3)
        suspected = first.any(axis=(0, 1, 3))
        excluded = suspected | np.take_along_axis(self.record.convicted, evidence.served, axis=1).any(0)
        nothing = np.zeros_like(flagged)
        worst = scores.max(0)
        return Verdict(
            step=evidence.step,
            warming_up=warming_up,
            judged=0 if warming_up else int(np.count_nonzero(~unjudged[self.judged])),
            scores=worst,
            alarms=flagged,
            disputes=nothing,
            worker_scores=np.zeros(struck.shape),
            suspected=suspected,
            excluded=excluded,
            convicted=self.record.convicted.copy(),
            findings=findings,
            disputed=(),
            newly_convicted=tuple(Worker(*worker) for worker in np.argwhere(newly).tolist()),
            released=(),
            skip=bool(excluded.all()),
            overflow=False,
            halt=None,
            suspects=self.record.suspects,
        )

    def _beyond(self, distances: np.ndarray) -> np.ndarray:
        """float64 [4, 2, L, C, M]: distance beyond the nearer quartile in IQRs; infinite for what is not finite."""
        assert self._recent is not None
        low, high = (bound[..., None, None] for bound in quantiles(self._recent, (0.25, 0.75)))
        iqr = np.maximum(high - low, np.finfo(np.float32).tiny)
        beyond = np.maximum(np.maximum(low - distances, distances - high), 0.0) / iqr
        return np.where(np.isfinite(distances), beyond, np.inf)

    def _choose_multiplier(self) -> None:
        samples = np.stack(self._honest, axis=-1).reshape(*self._multiplier.shape, -1)
        (tail,) = quantiles(samples, (1.0 - TARGET_RATE / len(_ROWS),))
        self._multiplier = np.maximum(tail, SMALLEST_MULTIPLIER)
        self._honest = []

    def _learn(self, distances: np.ndarray) -> None:
        rows = distances.reshape(*distances.shape[:3], -1)
        if self._recent is None:
            self._recent = np.full((*rows.shape[:3], WINDOW * rows.shape[3]), np.nan)
        width = rows.shape[3]
        slot = self._steps % WINDOW * width
        self._recent[..., slot : slot + width] = np.where(np.isfinite(rows), rows, np.nan)
        self._steps += 1

    def _findings(
        self, first: np.ndarray, scores: np.ndarray, distances: np.ndarray, served: np.ndarray
    ) -> Iterator[Finding]:
        for direction, link, column in np.argwhere(first.any(3)).tolist():
            where = (direction, link, column)
            micro_batches = np.flatnonzero(first[where])
            of_these = scores[(slice(None), *where)][:, micro_batches]
            row, index = np.unravel_index(np.argmax(of_these), of_these.shape)
            worst = int(micro_batches[index])
            stage = self.mesh.sender_stage(direction, link)
            blamed = tuple(micro_batches.tolist())
            value = float(distances[(row, *where, worst)])
            yield Finding(
                worker=Worker(stage, int(served[stage, column])),
                direction=direction,
                link=link,
                column=column,
                micro_batches=blamed,
                striking=blamed,
                micro_batch=worst,
                cause="fences",
                statistic=DISTANCES[row],
                value=value,
                residual=value,
                low=0.0,
                high=0.0,
                score=float(of_these[row, index]),
                trusted=self.mesh.is_trusted(stage),
                overflow=False,
                rests_on_pair=False,
                telling=(),
            )
