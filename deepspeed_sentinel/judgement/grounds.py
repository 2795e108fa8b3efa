"""What a finding rests on: statistics of the worker's messages alone, or of pairs, which its neighbours report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.judgement.blame import CONSPICUOUS


@dataclass(frozen=True)
class Grounds:
    """Why a worker is struck.

    Attributes:
        rests_on_pair: without the statistics of pairs nothing would accuse it.
        telling: the micro-batches whose statistics of the pair bear that out by themselves: those beyond a fence, or
            conspicuous where content would explain all else. Where no message is, and the sums accuse, it is all.
    """

    rests_on_pair: bool
    telling: tuple[int, ...]


def grounds(own_B: np.ndarray, fenced_B: np.ndarray, but_for_pair_B: np.ndarray, micro_batches: np.ndarray) -> Grounds:
    """What a finding about B micro-batches in alarm rests on.

    Args:
        own_B: float64, each message's largest score over the statistics of messages.
        fenced_B: float64, its largest score over the statistics of pairs, sums left out.
        but_for_pair_B: bool, whether the statistics of the pair alone keep content from explaining it.
        micro_batches: int [B], which these are.
    """
    telling = (fenced_B > 1.0) | (but_for_pair_B & (fenced_B >= CONSPICUOUS))
    chosen = micro_batches[telling] if telling.any() else micro_batches
    return Grounds(not bool(((own_B > 1.0) & ~but_for_pair_B).any()), tuple(chosen.tolist()))
