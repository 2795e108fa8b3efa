"""How well a run's attackers were found: counted over workers, messages and steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepspeed_sentinel.judgement.blame import followers
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh


@dataclass(frozen=True)
class _Ratio:
    part: int
    whole: int

    @property
    def value(self) -> float | None:
        return self.part / self.whole if self.whole else None


class Tally:
    """Counts of a guarded run, step by step.

    A worker counts as malicious from the first step in which it changed something. ``detection_steps`` is the step of
    the first alarm blamed on such a worker minus that step. A false alarm is a message blamed on a worker that is not
    malicious; its rate is over all judged messages that such workers sent.

    Of messages: a blamed one that was changed is right, any other is wrong, and a changed one is missed if neither it
    nor any before it on its micro-batch's way was blamed.

    Attributes:
        until_healed: from the first changed message to the latest conviction: steps, those of them that were skipped,
            and columns left out, summed over the steps; None before anybody is convicted.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        shape = (mesh.stages, mesh.replicas)
        self.convicted = np.zeros(shape, bool)
        self._blamed_first = np.full(shape, -1)
        self.judged_messages = self.false_alarms = self.honest_judged = 0
        self.changed_blamed = self.unchanged_blamed = self.changed_missed = 0
        self.skipped_steps = self.excluded_columns = self.disputes = 0
        self.twin_steps = self.proofs = self.cleared = 0
        self._attacked_since: int | None = None
        self._before_attack = (0, 0)
        self.until_healed: dict[str, int] | None = None

    def add(
        self,
        verdict: Verdict,
        served: np.ndarray,
        malicious: np.ndarray,
        altered: Iterable[tuple[int, int, int, int]] = (),
    ) -> None:
        """Count one step.

        Args:
            verdict: of the step.
            served: int [S, C], who served which column.
            malicious: bool [S, R], who has changed something in this step or before.
            altered: (direction, stage, column, micro-batch) of the messages changed in this step.
        """
        before = self.skipped_steps, self.excluded_columns
        self._add_messages(verdict, altered)
        micro_batches = verdict.scores.shape[3]
        self.judged_messages += verdict.judged
        if verdict.judged:
            self.honest_judged += micro_batches * self._honest_messages(served, malicious)
        for finding in verdict.findings:
            if not malicious[finding.worker]:
                self.false_alarms += len(finding.micro_batches)
            elif self._blamed_first[finding.worker] < 0:
                self._blamed_first[finding.worker] = verdict.step
        for proof in verdict.proofs:
            if malicious[proof.worker] and self._blamed_first[proof.worker] < 0:
                self._blamed_first[proof.worker] = verdict.step
        self.twin_steps += verdict.twins
        self.proofs += len(verdict.proofs)
        self.cleared += len(verdict.cleared)
        self.convicted |= verdict.convicted
        self.skipped_steps += verdict.skip
        self.excluded_columns += int(np.count_nonzero(verdict.excluded))
        self.disputes += len(verdict.disputed)
        if self._attacked_since is None and malicious.any():
            self._attacked_since, self._before_attack = verdict.step, before
        if verdict.newly_convicted and self._attacked_since is not None:
            self.until_healed = {
                "steps": verdict.step + 1 - self._attacked_since,
                "skipped_steps": self.skipped_steps - self._before_attack[0],
                "lost_columns": self.excluded_columns - self._before_attack[1],
            }

    def _add_messages(self, verdict: Verdict, altered: Iterable[tuple[int, int, int, int]]) -> None:
        changed, blamed = np.zeros(verdict.scores.shape, bool), np.zeros(verdict.scores.shape, bool)
        for direction, stage, column, micro_batch in altered:
            changed[direction, stage if direction == FORWARD else stage - 1, column, micro_batch] = True
        for finding in verdict.findings:
            blamed[finding.direction, finding.link, finding.column, list(finding.micro_batches)] = True
        for proof in verdict.proofs:
            if proof.direction is not None:
                link = proof.worker.stage - (proof.direction == BACKWARD)
                blamed[proof.direction, link, proof.column, list(proof.micro_batches)] = True
        self.changed_blamed += int(np.count_nonzero(changed & blamed))
        self.unchanged_blamed += int(np.count_nonzero(blamed & ~changed))
        self.changed_missed += int(np.count_nonzero(changed & ~blamed & ~followers(blamed)))

    def result(self, acted_first: np.ndarray) -> dict[str, Any]:
        """The part of ``result.json`` about detection; null where there is nothing to divide by.

        Args:
            acted_first: int [S, R], the first step in which a worker changed something; -1 is never.
        """
        malicious = acted_first >= 0
        found = int(np.count_nonzero(malicious & self.convicted))
        wrong = int(np.count_nonzero(~malicious & self.convicted))
        missed = int(np.count_nonzero(malicious & ~self.convicted))
        seen = malicious & (self._blamed_first >= 0)
        took = (self._blamed_first - acted_first)[seen]
        return {
            "malicious": np.argwhere(malicious).tolist(),
            "convicted": np.argwhere(self.convicted).tolist(),
            "precision": _Ratio(found, found + wrong).value,
            "recall": _Ratio(found, found + missed).value,
            "f1": _Ratio(2 * found, 2 * found + wrong + missed).value,
            "detection_steps_mean": float(took.mean()) if took.size else None,
            "detection_steps_max": int(took.max()) if took.size else None,
            "judged_messages": self.judged_messages,
            "false_alarms": self.false_alarms,
            "false_convictions": wrong,
            "false_alarm_rate": _Ratio(self.false_alarms, self.honest_judged).value,
        }

    def messages(self) -> dict[str, float | None]:
        """Precision, recall and F1 over messages; null where there is nothing to divide by."""
        right, wrong, missed = self.changed_blamed, self.unchanged_blamed, self.changed_missed
        return {
            "precision": _Ratio(right, right + wrong).value,
            "recall": _Ratio(right, right + missed).value,
            "f1": _Ratio(2 * right, 2 * right + wrong + missed).value,
        }

    def _honest_messages(self, served: np.ndarray, malicious: np.ndarray) -> int:
        honest = ~np.take_along_axis(malicious, served, axis=1)
        senders = {FORWARD: honest[:-1], BACKWARD: honest[1:]}
        return sum(int(np.count_nonzero(sending)) for sending in senders.values())
