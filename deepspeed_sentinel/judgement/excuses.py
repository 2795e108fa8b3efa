"""What explains alarms, so that they are no strike: content, turns of training, loss scaling, doubtful reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.evidence.table import Rows
from deepspeed_sentinel.judgement.content import content_alone
from deepspeed_sentinel.judgement.heard import Heard
from deepspeed_sentinel.judgement.measuring import Measured
from deepspeed_sentinel.mesh import BACKWARD


@dataclass(frozen=True)
class Judged:
    """All messages of a step as they were judged.

    Attributes:
        values: float64 [K, 2, L, C, M], statistics as reported.
        residuals: of the same shape, in the units that fences compare.
        per_statistic: of the same shape, scores by fences and sums.
        fenced: float64 [statistics of pairs, 2, L, C, M], scores by fences alone.
        scores: float64 [2, L, C, M], the largest of all statistics; 0 where nothing was judged.
        overflow: bool [2, L, C, M], non-finite gradients that loss scaling may explain.
        content: bool [2, L, C, M], alarms that content explains.
        but_for_pair: bool [2, L, C, M], alarms that it would explain but for the statistics of the pair.
        doubted: bool [2, L, C, M], alarms by nothing but what the two ends of the link report differently.
        turn: bool [2, L, C, M], alarms in nothing but what training has turned in.
        alone: bool [2, L, C, M], alarms of the only replica, which nothing can be held against but its own past.
        excused: bool [2, L, C, M], alarms that are no strike whatever came before.
    """

    values: np.ndarray
    residuals: np.ndarray
    per_statistic: np.ndarray
    fenced: np.ndarray
    scores: np.ndarray
    overflow: np.ndarray
    content: np.ndarray
    but_for_pair: np.ndarray
    doubted: np.ndarray
    turn: np.ndarray
    alone: np.ndarray
    excused: np.ndarray

    @classmethod
    def of(
        cls,
        alarms: np.ndarray,
        scores: np.ndarray,
        heard: Heard,
        measured: Measured,
        overflow: np.ndarray,
        right: np.ndarray,
        table: Rows,
        compares_replicas: bool,
    ) -> Judged:
        """Look for excuses.

        Args:
            alarms: bool [2, L, C, M].
            scores: float64 [2, L, C, M].
            heard, measured: the step.
            overflow: bool [2, L, C, M], non-finite gradients that loss scaling may explain.
            right: bool [2, L, C, M], messages that a twin step has shown to be the truth.
            table: the rows judged.
            compares_replicas: there are others to compare with.
        """
        nowhere = np.zeros(alarms.shape, bool)
        values, of_pair = heard.values, table.of_pair
        content = but_for_pair = doubted = turn = nowhere
        per_statistic = fenced = np.zeros((len(table), 0))  # of no use where nothing is in alarm
        if alarms.any():
            values = values.copy()
            values[table.hard] = heard.by_hard
            per_statistic, fenced = measured.held.per_statistic, measured.held.per_statistic[of_pair]
            # What most replicas did, training did, and what comes of it strikes nobody.
            turned = measured.turned[..., None, None]
            turn = alarms & ~(np.where(turned, 0.0, per_statistic) > 1.0).any(0)
            sums = measured.sums
            if sums is not None:
                per_statistic[of_pair] = np.fmax(fenced, sums)
                turn &= ~(per_statistic[of_pair] > np.fmax(fenced, 1.0)).any(0)
            content, but_for_pair = content_alone(
                alarms & ~measured.firm, per_statistic, values, measured.unlike, table
            )
            # Without what the two ends report differently nothing would be outside.
            said = heard.said.doubted
            doubted = said.any(0) & (np.where(said, 0.0, per_statistic).max(0) <= 1.0)
        alone = alarms & ~measured.firm & (not compares_replicas)
        undecided = nowhere
        if heard.nothing.open.any():
            undecided = np.zeros_like(alarms)
            either = heard.hard[:, BACKWARD].any(0)
            undecided[BACKWARD] = heard.nothing.open & ~either & (heard.changed[BACKWARD] == 0)
        excused = overflow | content | alone | right | undecided | doubted | turn
        return cls(
            values=values,
            residuals=measured.residuals,
            per_statistic=per_statistic,
            fenced=fenced,
            scores=scores,
            overflow=overflow,
            content=content,
            but_for_pair=but_for_pair,
            doubted=doubted,
            turn=turn,
            alone=alone,
            excused=excused,
        )
