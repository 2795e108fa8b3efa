"""Residuals and scores of a step in which much may be spoilt: what only follows an alarm must not set a centre."""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.judgement.blame import followers
from deepspeed_sentinel.judgement.centre import Centre
from deepspeed_sentinel.judgement.fences import Fences
from deepspeed_sentinel.judgement.held import Held

_PASSES = 24


def hold_against_fences(
    held: Held, fences: Fences, surely: np.ndarray, whole: np.ndarray, sound: np.ndarray
) -> np.ndarray:
    """Work out the residuals and scores of a step; which messages are cascade, bool [2, L, C, M].

    What follows an alarm must not set the centre that others are measured from: where every stage has its bad
    workers, most columns are spoilt by the last one, and the honest ones would stand out. So residuals are taken
    anew without the cascade until it no longer changes. Where half of the columns left are in alarm, the median
    may be anybody's, and the recent past decides. What convicted workers had a hand in sets a centre where the others
    alone could be mostly bad: columns of five that two convicted workers serve well still make a minority of the two
    that tamper behind them.

    Args:
        held: the messages of the step.
        fences: of all links.
        surely: bool [2, L, C, M], alarms that need no fence.
        whole: bool [2, L, C, M], finite messages that nobody disputes.
        sound: bool [2, L, C, M], those of them that no convicted worker had a hand in.
    """
    doubtful = np.zeros(sound.shape[:2], bool)
    eligible = first = _chosen(fences.centre, sound, whole, whole)
    for _ in range(_PASSES):
        held.measure(eligible, doubtful)
        alarms = (held.largest > 1.0) | surely
        spoilt = alarms | ~whole
        cascade = followers(spoilt)
        if eligible is first and not spoilt.any():
            break
        narrowed = _chosen(fences.centre, sound & ~cascade, whole & ~cascade, whole)
        if np.array_equal(narrowed, eligible):
            left, in_alarm = (np.count_nonzero(which.any(-1), axis=-1) for which in (narrowed, narrowed & alarms))
            widened = doubtful | ((2 * in_alarm >= left) & (in_alarm > 0) & fences.has_majority)
            if np.array_equal(widened, doubtful):
                break
            doubtful = widened
        eligible = narrowed
    return cascade


def _chosen(centre: Centre, best: np.ndarray, good: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Which of these messages (bool [2, L, C, M]) set the centre of each link.

    The best or else the good, if the bad cannot be most of them; otherwise the first of the three that holds any.
    """
    if best.all():
        return best
    result = np.ones_like(best)
    for choice in (last, good, best):
        result = np.where(choice.any(axis=(2, 3), keepdims=True), choice, result)
    for choice in (good, best):
        result = np.where(centre.certain(choice)[..., None, None], choice, result)
    return result
