"""The smallest explanation of events that each involve somebody bad: as few workers of any one stage as possible.

In a large mesh a search that tries one choice after another does not come to its end. What it leaves is tried by
exchange of single workers, from who is isolated, so that what one step leaves the next goes on with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MOST_TRIES = 500  # of one search; beyond, workers are exchanged, as often
_MOST_LOOKS = 4_000_000  # at workers involved, in one search: fewer tries where each has to look at more


def smallest_explanation(
    events: Sequence[tuple[int, ...]], convicted: np.ndarray, isolated: np.ndarray, least: int
) -> np.ndarray | None:
    """Of whom each event involves one, bool [S, R], with those convicted as few of a stage as possible.

    Args:
        events: who is involved in each, s R + r of each in order; nobody convicted.
        convicted: bool [S, R].
        isolated: bool [S, R], who explained the events before; none of them convicted.
        least: how many of a stage there may be at least.

    Returns:
        where the search has come to its end too early, who explains most; None where (R - 1) // 2 of a stage cannot.
    """
    involved = _padded(events, isolated.size)
    number = np.count_nonzero(convicted, axis=1)
    least, most = max(int(number.max()), least, bool(events)), (isolated.shape[1] - 1) // 2
    found, left = _within(involved, least - number, isolated)
    # Often as few as before do. Otherwise by halves, so that there are few searches however many replicas.
    low, high = least + 1, most if left else least
    while low <= high:
        allowed = (low + high) // 2
        other, more = _within(involved, allowed - number, isolated)
        if left or not more:
            found, left = other, more
        if more:
            low = allowed + 1
        else:
            high = allowed - 1
    return found


def _within(events: np.ndarray, room: np.ndarray, isolated: np.ndarray) -> tuple[np.ndarray | None, int]:
    """As ``_search``; what that leaves is tried by exchange, from who is isolated and from what it found."""
    found, left = _search(events, room, isolated)
    known = isolated & (np.cumsum(isolated, axis=1) <= room[:, None])
    for start in [] if found is None else [known, found]:
        if left:
            found, left = min((found, left), _exchange(events, room, start), key=lambda one: one[1])
    return found, left


def _search(events: np.ndarray, room: np.ndarray, isolated: np.ndarray) -> tuple[np.ndarray | None, int]:
    """Depth first, who is involved in most events first; ``room``, int [S], is how many of each there may be.

    It proves that there is no explanation, or finds one, where few tries do.

    Returns:
        who explains most, or None if nobody can explain all, and how many events it leaves.
    """
    nobody, known = isolated.size, isolated.ravel()
    # Who is in it, and who is not. The last place is for who is missing in an event.
    tries = [(np.zeros(nobody + 1, bool), np.arange(nobody + 1) == nobody)]
    best, left = None, len(events) + 1
    for _ in range(_tries(events)):
        if not tries:
            return None, left
        inside, outside = tries.pop()
        unexplained = events[~inside[events].any(1)]
        if len(unexplained) < left:
            best, left = inside[:-1].reshape(isolated.shape), len(unexplained)
        if not left:
            break
        full = np.count_nonzero(inside[:-1].reshape(isolated.shape), axis=1) >= room
        barred = outside.copy()
        barred[:-1] |= np.broadcast_to(full[:, None], isolated.shape).ravel()
        free = ~barred[unexplained]
        hardest = int(np.argmin(np.count_nonzero(free, axis=1)))
        involved = [
            (-int(np.count_nonzero(unexplained == one)), not known[one], one)
            for one in unexplained[hardest][free[hardest]].tolist()
        ]
        options = [one for _, _, one in sorted(involved)]
        # Of the first option that holds, those before it are not in it.
        for number in reversed(range(len(options))):
            more, less = inside.copy(), outside.copy()
            more[options[number]] = less[options[:number]] = True
            tries.append((more, less))
    return best, left


def _exchange(events: np.ndarray, room: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, int]:
    """For an event that nobody explains one worker is taken in, and for the next one, until all are explained.

    In a full stage another one gives way. Each event weighs as much as it was often left unexplained, so that what
    somebody gave way for is not undone at once: who is taken in explains what weighs most, and who gives way is
    missed least.

    Args:
        events: int [N, most involved in one], as ``_padded``.
        room: int [S], how many of each stage there may be.
        start: bool [S, R], who is inside at first, no more than that.

    Returns:
        who explains most, bool [S, R], and how many events it leaves.
    """
    nobody, replicas = start.size, start.shape[1]
    inside = np.concatenate([start.ravel(), [False]])
    weights = np.ones(len(events), np.int64)
    best, left = start, len(events) + 1
    for _ in range(_tries(events)):
        explained_by = np.count_nonzero(inside[events], axis=1)
        unexplained = explained_by == 0
        number = int(np.count_nonzero(unexplained))
        if number < left:
            best, left = inside[:-1].reshape(start.shape).copy(), number
        if not left:
            break
        weights[unexplained] += 1
        gained = _weight_of_each(events[unexplained], weights[unexplained], nobody)
        alone = explained_by == 1
        missed = _weight_of_each(events[alone], weights[alone], nobody)
        options = []
        for one in events[np.argmax(np.where(unexplained, weights, 0))].tolist():
            if one == nobody or not room[one // replicas]:
                continue
            first = one // replicas * replicas
            others = first + np.flatnonzero(inside[first : first + replicas])
            if len(others) < room[one // replicas]:
                options.append((-gained[one], one, nobody))
            else:
                other = int(others[np.argmin(missed[others])])
                options.append((missed[other] - gained[one], one, other))
        if not options:
            break
        _, one, other = min(options)
        inside[other], inside[one] = False, True
    return best, left


def _padded(events: Sequence[tuple[int, ...]], nobody: int) -> np.ndarray:
    """int [N, most involved in one], of events the workers involved, and ``nobody`` where there are fewer."""
    most = max(map(len, events), default=0)
    rows = [workers + (nobody,) * (most - len(workers)) for workers in events]
    return np.array(rows, np.int64).reshape(len(events), most)


def _tries(events: np.ndarray) -> int:
    """How many tries a search has, whose time grows with the events (int [N, most involved in one])."""
    return min(_MOST_TRIES, 1 + _MOST_LOOKS // max(events.size, 1))


def _weight_of_each(events: np.ndarray, weights: np.ndarray, nobody: int) -> np.ndarray:
    """float64 [S R + 1], what the events (int [N, most]) of each worker weigh (int [N]): whole numbers, so exact."""
    each = np.broadcast_to(weights[:, None], events.shape)
    return np.bincount(events.ravel(), each.ravel(), minlength=nobody + 1)
