"""Whether a device is in alarm more often than its peers: an exact test, for people; no verdict hangs on it.

What is counted is steps, not messages: the micro-batches of a step have weights, fences and often a fault in common,
so their alarms come in bursts, and a test that took each for a draw of its own would find honest devices. Of device d,
a is the number of steps in which it was in alarm, n that in which it was judged; A and N are the sums over its peers.
Given a + A, and if d were in alarm ``MARGIN`` times as often as they, a would be binomial (Przyborowski and Wilenski,
"Homogeneity of results in testing samples from Poisson series", Biometrika 31, 1940):

    chance = P(X >= a),   X ~ Binomial(a + A, MARGIN n / (MARGIN n + N))

It counts the uncertainty of the peers' rate, which a Poisson bound at that rate does not. d is reported when its chance
lies below ``TAIL`` / number of devices, and a >= ``FEWEST``. The margin is there because honest devices are not equal:
over many steps an exact test of equality finds any difference between stages.

Peers of whom one is bad must not hide another one. So it is done twice: first against the half of the devices that are
in alarm least often; then, of whom that finds, against all whom it does not. Without a bad device it finds nobody
almost always, so the second test, which keeps the level, is against all other devices.

Worked example, 8 devices with 10,000 steps each: two of 400 and 90 steps in alarm, six of 10. Against all others the
second has 90 and they 460, no more than its share. The five least often in alarm have 50 in 50,000, so of 140 with
theirs 40 would do no harm, and 90 have a chance of 2e-18, below 1e-4 / 8. Both are reported, against the six.
"""

from __future__ import annotations

import math

import numpy as np

TAIL = 1e-4
MARGIN = 2.0
FEWEST = 3
_MOST_DRAWS = 1 << 24
_ENOUGH = 1e-12  # relative size of the terms of a sum that are left out


def above_peers(alarmed: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which devices are in alarm more often than ``MARGIN`` times their peers' rate.

    Args:
        alarmed: int [D], steps in which each device was in alarm.
        steps: int [D], steps in which it was judged; at least as many.

    Returns:
        above: bool [D]. chance: float64 [D], of the test that it was last put to. peers: float64 [D], the rate that it
        was compared with; NaN without peers.
    """
    count = len(alarmed)
    if not count:
        return np.zeros(0, bool), np.zeros(0), np.zeros(0)
    alarmed, steps = alarmed.astype(np.float64), steps.astype(np.float64)  # sums of integers could wrap
    rate = alarmed / np.maximum(steps, 1)
    quiet = np.zeros(count, bool)
    quiet[np.argsort(rate, kind="stable")[: count - (count - 1) // 2]] = True
    limit = TAIL / count
    first, _ = _against(quiet, alarmed, steps)
    suspects = (alarmed >= FEWEST) & (first < limit)
    chance, peers = _against(~suspects, alarmed, steps)
    return suspects & (chance < limit), chance, peers


def binomial_tail(least: np.ndarray, draws: np.ndarray, share: np.ndarray) -> np.ndarray:
    """float64 [D]: P(X >= least) for X ~ Binomial(draws, share); 1 where ``least`` is not above the mean.

    Above the mean each term is smaller than the one before it, so terms are added until they do not count. Of very many
    draws these would be too many, and the first could not be computed; there it is a bound that lies above (Chernoff's,
    with KL(a || p) >= (a - p)^2 / 2a), so that less is found:

        P(X >= k) <= exp(-(k - n p)^2 / 2k)

    Args:
        least, draws: int or float64 [D], whole numbers, least <= draws.
        share: float64 [D].
    """
    result = np.ones(len(least))
    above = np.flatnonzero((least > draws * share) & (share > 0))
    result[(share <= 0) & (least > 0)] = 0.0
    many = above[draws[above] > _MOST_DRAWS]
    above = above[draws[above] <= _MOST_DRAWS]
    far = least[many] - draws[many] * share[many]
    result[many] = np.exp(-far * far / (2.0 * least[many]))
    k, n, p = least[above].astype(np.float64), draws[above].astype(np.float64), share[above]
    start = _log_factorial(n) - _log_factorial(k) - _log_factorial(n - k) + k * np.log(p) + (n - k) * np.log1p(-p)
    total, term = np.ones_like(k), np.ones_like(k)
    while (term > _ENOUGH * total).any():
        term = term * (n - k) / (k + 1) * p / (1 - p)
        total += term
        k += 1
    result[above] = np.minimum(np.exp(start) * total, 1.0)
    return result


def _against(reference: np.ndarray, alarmed: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chance of each device against a set (bool [D]) without itself, and that set's rate."""
    others_alarmed = (alarmed * reference).sum() - alarmed * reference
    others_steps = (steps * reference).sum() - steps * reference
    weighted = MARGIN * steps
    share = np.divide(weighted, weighted + others_steps, out=np.ones(len(steps)), where=weighted + others_steps > 0)
    peers = np.divide(others_alarmed, others_steps, out=np.full(len(steps), np.nan), where=others_steps > 0)
    return binomial_tail(alarmed, alarmed + others_alarmed, share), peers


def _log_factorial(values: np.ndarray) -> np.ndarray:
    return np.array([math.lgamma(value + 1) for value in values.tolist()], np.float64)
