"""Who of a stage is to wait in lost columns, and who is tried meanwhile (``dealing.py``). It hangs on the doubts and on
the turn alone, never on who stands where: else dealing would not come to rest.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.judgement.doubts import Doubts

NO_SUSPECT, TRIED, QUEUED, LEFT_OVER = range(4)


def waiting(doubts: Doubts, odds: np.ndarray, lost: int) -> np.ndarray:
    """Of each two of a stage that differed one, as far as there are places: who differed from most first.

    Args:
        odds: int64 [n, 4], both of them of one stage, in both orders.
        lost: number of columns to wait in.

    Returns:
        bool [S, R]
    """
    waits = np.zeros_like(doubts.packed)
    stages, rows = np.unique(odds[:, 0], return_inverse=True)
    count, replicas = len(stages), waits.shape[1]
    packed, suspected = doubts.packed[stages], (doubts.suspects | doubts.untried)[stages]
    isolated = waits[stages] if doubts.isolated is None else doubts.isolated[stages]
    open_NRR = np.zeros((count, replicas, replicas), bool)
    open_NRR[rows, odds[:, 1], odds[:, 3]] = True
    # Who is packed waits already.
    open_NRR &= ~(packed[:, :, None] | packed[:, None]) & (suspected[:, :, None] | suspected[:, None])
    # Of equals rather who is not accused, not suspected, isolated: what is unproved is of this one, unless the others
    # alone show it too.
    tie = ((~doubts.accused[stages] * 2 + ~suspected) * 2 + isolated) * replicas + np.arange(replicas)
    places = lost - np.count_nonzero(packed, axis=1)
    while (row := np.flatnonzero(open_NRR.any((1, 2)) & (places > 0))).size:
        others = np.count_nonzero(open_NRR, axis=2)
        # Rather not the only suspect of the two: it is the one to be tried.
        better = np.where(suspected, np.count_nonzero(open_NRR & suspected[:, None], axis=2), others)
        worth = (better * (replicas + 1) + others) * 8 * replicas + tie
        replica = np.argmax(worth[row], axis=1)
        waits[stages[row], replica] = True
        open_NRR[row, replica] = open_NRR[row, :, replica] = False
        places[row] -= 1
    return waits


def kinds_of(suspects: np.ndarray, places: int, beside: np.ndarray, turn: int) -> np.ndarray:
    """The suspects (bool [S, R]) of a stage in the order in which they take turns, int64 [S, R].

    First as many as there are places to try them, then as many as there is room for beside the convicted (int64 [S]),
    and the others are left over. Who waits beside them changes with the turns too: so those left over are compared
    with others of their stage.
    """
    kinds = np.full(suspects.shape, NO_SUSPECT)
    for stage in np.flatnonzero(suspects.any(1)).tolist():
        order = np.flatnonzero(suspects[stage])
        if len(order) > places:
            order = np.roll(order, -turn * places)
        waiting, left_over = order[places:], order[places + beside[stage] :]
        kinds[stage, order], kinds[stage, waiting], kinds[stage, left_over] = TRIED, QUEUED, LEFT_OVER
    return kinds
