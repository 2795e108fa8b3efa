"""What a finding rests on: statistics of the worker's messages alone, or of pairs, which its neighbours report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.evidence import exact
from deepspeed_sentinel.judgement.blame import CONSPICUOUS


@dataclass(frozen=True)
class Grounds:
    """Why a worker is blamed.

    Attributes:
        rests_on_pair: without the statistics of pairs nothing would accuse it.
        telling: the micro-batches whose statistics of the pair bear that out by themselves: those beyond a fence (or
            conspicuous, where only later alarms led to the worker). Where no message is, and the sums accuse, it is
            all of them.
    """

    rests_on_pair: bool
    telling: tuple[int, ...]


def grounds(own_B: np.ndarray, fenced_B: np.ndarray, scores_B: np.ndarray, micro_batches: np.ndarray) -> Grounds:
    """What a finding about B micro-batches rests on.

    Args:
        own_B: float64, each message's largest score over the statistics of messages.
        fenced_B: float64, its largest score over the statistics of pairs, sums left out.
        scores_B: float64, its largest score over everything.
        micro_batches: int [B], which these are.
    """
    alarmed = (scores_B > 1.0).any()
    if alarmed:
        stands_alone, telling = bool((own_B > 1.0).any()), fenced_B > 1.0
        summed = not telling.any()
    else:
        stands_alone, telling = bool(exact.total(own_B) >= CONSPICUOUS * len(own_B)), fenced_B >= CONSPICUOUS
        summed = not telling.any() and bool((scores_B >= CONSPICUOUS).any())
    chosen = micro_batches if summed else micro_batches[telling]
    return Grounds(not stands_alone, tuple(chosen.tolist()))
