"""Blame: of all that went wrong on a micro-batch's way, the first in the order of the data flow counts.

The way of a micro-batch is forward over links 0 .. L-1, then backward over links L-1 .. 0. What follows its first
event is the cascade: neither counted nor learnt from. Fences differ from link to link, so a tampered message can
stay just inside its own and break a later one. Two rules follow, and neither lets a worker choose who is struck:

* An alarm is traced back to work before it that is conspicuous: half-way to its fence, on average over *all* of a
  worker's messages in that column and direction, whether something went wrong behind them or not. (Averaged over those
  that lead to alarms, it would be up to whoever raises them behind it: one honest message in a hundred or two scores as
  much.) What is traced back to is named and never struck.
* An alarm strikes its sender only if nothing that reached it was conspicuous: not that micro-batch's own messages
  before it, nor any alarm before it in that column. Otherwise it may be an echo, and the column is left out without a
  strike.

For example, with messages of a micro-batch in the order of their flow, worker by worker:

    scores 0.1  0.7  4.0      the third is in alarm, the second may have caused it: nobody is struck
    scores 0.1  0.2  4.0      the third is struck
    scores 1.2  0.2  4.0      the first is struck, the third is cascade
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.evidence import exact

CONSPICUOUS = 0.5


@dataclass(frozen=True)
class Blame:
    """Which messages of a step count, each bool [2, L, C, M].

    Attributes:
        named: of each micro-batch the first alarm, or the work that it was traced to, and what strikes.
        strikes: alarms that tell against their sender: first on their way, and nothing before them, nor loss scaling,
            can explain them.
        disputes: disputes with nothing before them.
    """

    named: np.ndarray
    strikes: np.ndarray
    disputes: np.ndarray

    @classmethod
    def of(
        cls, alarms: np.ndarray, disputes: np.ndarray, scores: np.ndarray, excused: np.ndarray, certain: np.ndarray
    ) -> Blame:
        """Place the blame.

        Args:
            alarms, disputes: bool [2, L, C, M].
            scores: float64 [2, L, C, M], 1 on the fence.
            excused: bool [2, L, C, M], alarms that are no strike whatever came before.
            certain: bool [2, L, C, M], alarms that are one whatever came before: nothing conspicuous can cause them.
        """
        if not (alarms.any() or disputes.any()):
            return cls(*(np.zeros_like(alarms) for _ in range(3)))
        alarms, disputes, scores, excused, certain = map(chain_order, (alarms, disputes, scores, excused, certain))
        events = alarms | disputes
        conspicuous = _conspicuous_work(scores, ~_after(events))[:, :, None]
        alarm_follows = np.logical_or.accumulate(alarms[::-1], axis=0)[::-1]
        first = _first(events | (alarm_follows & conspicuous))
        first_alarms = _first(events) & alarms & ~disputes
        doubtful = (scores >= CONSPICUOUS) | conspicuous | first_alarms.any(2, keepdims=True)
        strikes = first_alarms & (certain | ~_reached_by(doubtful)) & ~excused
        return cls(*map(by_link, ((first & ~disputes) | strikes, strikes, first & disputes)))


def chain_order(per_message: np.ndarray) -> np.ndarray:
    """[2, L, C, M] -> [2L, C, M] in the order in which a micro-batch passes."""
    return np.concatenate([per_message[0], per_message[1][::-1]])


def followers(events: np.ndarray) -> np.ndarray:
    """Messages that come after an event (bool [2, L, C, M]) on their micro-batch's way."""
    if not events.any():
        return np.zeros_like(events)
    return by_link(_after(chain_order(events)))


def by_link(ordered: np.ndarray) -> np.ndarray:
    """The inverse of ``chain_order``: [2L, ...] -> [2, L, ...]."""
    links = len(ordered) // 2
    return np.stack([ordered[:links], ordered[links:][::-1]])


def _after(ordered: np.ndarray) -> np.ndarray:
    """Messages behind one that is marked, bool [2L, C, M]."""
    after = np.zeros_like(ordered)
    after[1:] = np.logical_or.accumulate(ordered, axis=0)[:-1]
    return after


def _first(ordered: np.ndarray) -> np.ndarray:
    return np.asarray(ordered & ~_after(ordered))


def _conspicuous_work(scores: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Where the messages of one sender that count (bool [2L, C, M]) are half-way to the fence on average, bool [2L, C].

    A message beyond the fence counts as one on it, so that a single one does not speak for all others.
    """
    total = exact.total(np.where(counted, np.minimum(scores, 1.0), 0.0))
    messages = np.count_nonzero(counted, axis=2)
    return np.asarray((total >= CONSPICUOUS * messages) & (messages > 0))


def _reached_by(ordered: np.ndarray) -> np.ndarray:
    """Messages behind one of *another* stage that is marked, bool [2L, C, M]: a worker does not explain itself."""
    links = len(ordered) // 2
    before = np.zeros(ordered.shape, np.int64)
    before[1:] = np.cumsum(ordered, axis=0)[:-1]
    # Stage s sends forward over link s and backward over link s - 1, which is at position 2 links - s.
    own = np.arange(1, links)
    before[2 * links - own] -= ordered[own]
    return before > 0
