"""Residuals and scores of a step in which much may be spoilt: what only follows an alarm must not set a centre."""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.judgement.blame import followers
from deepspeed_sentinel.judgement.fences import Fences

_PASSES = 24


def hold_against_fences(
    fences: Fences,
    values: np.ndarray,
    compared: np.ndarray,
    whole: np.ndarray,
    sound: np.ndarray,
    hard: np.ndarray,
    room: np.ndarray,
    warming_up: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals and scores [K, 2, L, C, M], and which messages are cascade, bool [2, L, C, M].

    What follows an alarm must not set the centre that others are measured from: where every stage has its bad
    workers, most columns are spoilt by the last one, and the honest ones would stand out. So residuals are taken
    anew without the cascade until it no longer changes. Where half of the columns left are in alarm, the median
    may be anybody's, and the recent past decides.

    Args:
        fences: of all links.
        values, compared: float64 [K, 2, L, C, M], statistics as reported and in the units that fences compare.
        whole: bool [2, L, C, M], finite messages that nobody disputes.
        sound: bool [2, L, C, M], those of them that no convicted worker had a hand in.
        hard: bool [K], rows without a fence.
        room: float64 [C], by how much the fences of a column are wider.
        warming_up: there are no fences yet.
    """
    doubtful = np.zeros(sound.shape[:2], bool)
    eligible = _first_with_any(sound, whole)
    for _ in range(_PASSES):
        residuals = fences.residuals(compared, eligible, doubtful)
        if warming_up:
            per_statistic = np.zeros_like(residuals)
        else:
            per_statistic = fences.scores(compared, residuals, eligible, doubtful, room)
        per_statistic[hard] = np.where(values[hard] > 0, np.inf, 0.0)
        alarms = per_statistic.max(0) > 1.0
        cascade = followers(alarms | ~whole)
        narrowed = _first_with_any(sound & ~cascade, whole & ~cascade, whole)
        if np.array_equal(narrowed, eligible):
            left, in_alarm = (np.count_nonzero(which.any(-1), axis=-1) for which in (narrowed, narrowed & alarms))
            widened = doubtful | ((2 * in_alarm >= left) & (in_alarm > 0) & fences.has_majority)
            if np.array_equal(widened, doubtful):
                break
            doubtful = widened
        eligible = narrowed
    return residuals, per_statistic, cascade


def _first_with_any(*choices: np.ndarray) -> np.ndarray:
    """Of each link the first choice (bool [2, L, C, M]) that holds any of its messages, else all of them."""
    result = np.ones_like(choices[0])
    for choice in reversed(choices):
        result = np.where(choice.any(axis=(2, 3), keepdims=True), choice, result)
    return result
