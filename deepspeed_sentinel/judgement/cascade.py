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
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Residuals and scores [K, 2, L, C, M]; which messages are cascade, bool [2, L, C, M]; where training turned.

    The last is bool [K, 2, L], in this step or of late, see ``Fences.end_turns``.

    What follows an alarm must not set the centre that others are measured from: where every stage has its bad
    workers, most columns are spoilt by the last one, and the honest ones would stand out. So residuals are taken
    anew without the cascade until it no longer changes. Where half of the columns left are in alarm, the median
    may be anybody's, and the recent past decides. What convicted workers had a hand in sets a centre where the others
    alone could be mostly bad: columns of five that two convicted workers serve well still make a minority of the two
    that tamper behind them.

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
    eligible = _chosen(fences, sound, whole, whole)
    for _ in range(_PASSES):
        residuals, own = fences.residuals(compared, eligible, doubtful)
        if warming_up:
            per_statistic = np.zeros_like(residuals)
        else:
            per_statistic = fences.scores(compared, residuals, eligible, own, room)
        certain = values[hard] > 0  # on a way of its own, which no statistic can close
        per_statistic[hard] = np.where(certain, np.inf, 0.0)
        alarms = (np.fmax.reduce(per_statistic, axis=0) > 1.0) | certain.any(0)
        cascade = followers(alarms | ~whole)
        narrowed = _chosen(fences, sound & ~cascade, whole & ~cascade, whole)
        if np.array_equal(narrowed, eligible):
            left, in_alarm = (np.count_nonzero(which.any(-1), axis=-1) for which in (narrowed, narrowed & alarms))
            widened = doubtful | ((2 * in_alarm >= left) & (in_alarm > 0) & fences.has_majority)
            if np.array_equal(widened, doubtful):
                break
            doubtful = widened
        eligible = narrowed
    assert not np.isnan(per_statistic).any(), "a score that is no number would be no alarm"
    return residuals, per_statistic, cascade, fences.end_turns()


def _chosen(fences: Fences, best: np.ndarray, good: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Which of these messages (bool [2, L, C, M]) set the centre of each link.

    The best or else the good, if the bad cannot be most of them; otherwise the first of the three that holds any.
    """
    result = np.ones_like(best)
    for choice in (last, good, best):
        result = np.where(choice.any(axis=(2, 3), keepdims=True), choice, result)
    for choice in (good, best):
        result = np.where(fences.certain(choice)[..., None, None], choice, result)
    return result
