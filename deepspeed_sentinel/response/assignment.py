"""Who takes which place so that it costs least: the linear assignment problem, in whole numbers.

Shortest augmenting paths over reduced costs, as in D. F. Crouse, "On implementing 2D rectangular assignment
algorithms", IEEE Transactions on Aerospace and Electronic Systems 52(4), 2016. Ties are broken by index alone, so all
ranks find the same.

Worked example, two that both like place 0 best, of whom the second would lose more by going elsewhere:

    0 1 5
    0 4 4      0 takes place 1 and 1 takes place 0, for 1 in all
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

_NEVER = np.iinfo(np.int64).max


def cheapest(cost: np.ndarray, stands: np.ndarray) -> np.ndarray:
    """The place of each, int64 [m], all different, of the least sum.

    Args:
        cost: int64 [m, n], of each in each place, m <= n. Sums of a column's worth must fit into int64.
        stands: int64 [m], all different. Who finds nothing cheaper than this starts there, which saves work.
    """
    everybody, places = np.arange(len(cost)), cost.shape[1]
    place, holder = np.full(len(cost), -1), np.full(places, -1)
    stays = np.flatnonzero(cost[everybody, stands] == cost.min(1))
    place[stays] = stands[stays]
    holder[place[stays]] = stays
    # cost - of_worker - of_place is nowhere negative, and 0 where somebody stands. Who stays is worth to others what it
    # would lose elsewhere, so that few come to ask.
    elsewhere = cost.copy()
    elsewhere[everybody, stands] = cost.max(initial=0)
    of_place = np.zeros(places, np.int64)
    of_place[place[stays]] = (cost[everybody, stands] - elsewhere.min(1))[stays]
    of_worker = (cost - of_place).min(1)
    newcomers = np.flatnonzero(place < 0)
    wanting, wanted = np.nonzero((cost[newcomers] == of_worker[newcomers, None] + of_place) & (holder < 0))
    ends = np.searchsorted(wanting, np.arange(len(newcomers) + 1)).tolist()
    free, taken = wanted.tolist(), dict[int, int]()
    for number, (start, end) in enumerate(pairwise(ends)):
        first = next((one for one in free[start:end] if one not in taken), None)
        if first is not None:
            taken[first] = number
    holder[list(taken)] = newcomers[list(taken.values())]
    place[holder[list(taken)]] = list(taken)
    for newcomer in newcomers[place[newcomers] < 0].tolist():
        way = np.full(places, _NEVER)  # to each place, from the newcomer on
        by = np.full(places, -1)  # who would come to it
        far = way.copy()  # the same, and _NEVER where the shortest one is known
        known: list[int] = []
        worker, length = newcomer, 0
        while True:
            reached = length + cost[worker] - of_worker[worker] - of_place
            shorter = reached < way
            shorter[known] = False
            way[shorter] = far[shorter] = reached[shorter]
            by[shorter] = worker
            length = int(far.min())
            nearest = np.flatnonzero(far == length)
            end = int(nearest[np.argmax(holder[nearest] < 0)])  # rather one that nobody holds
            if holder[end] < 0:
                break
            known.append(end)
            far[end] = _NEVER
            worker = int(holder[end])
        saved = length - way[known]
        of_worker[newcomer] += length
        of_worker[holder[known]] += saved
        of_place[known] -= saved
        while end >= 0:
            worker = int(by[end])
            holder[end] = worker
            place[worker], end = end, int(place[worker])
    return place
