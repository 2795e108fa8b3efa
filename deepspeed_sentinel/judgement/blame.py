"""Blame: of all that went wrong on a micro-batch's way, the first in the order of the data flow counts.

The way of a micro-batch is forward over links 0 .. L-1, then backward over links L-1 .. 0. What follows its first
event is the cascade: neither counted nor learnt from. Fences differ from link to link, so a tampered message can
stay just inside its own and break a later one. An alarm is therefore traced back: the blame falls on the first
message of that micro-batch that is at least conspicuous, or in alarm itself. Conspicuous is a worker's work in a
column, not a message: an honest message now and then scores as much, all that lead to alarms together hardly do.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence import exact


def chain_order(per_message: np.ndarray) -> np.ndarray:
    """[2, L, C, M] -> [2L, C, M] in the order in which a micro-batch passes."""
    return np.concatenate([per_message[0], per_message[1][::-1]])


def _by_link(ordered: np.ndarray) -> np.ndarray:
    """The inverse of ``chain_order``."""
    links = len(ordered) // 2
    return np.stack([ordered[:links], ordered[links:][::-1]])


CONSPICUOUS = 0.5


def trace_back(alarms: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Alarms (bool [2, L, C, M]) and, where a micro-batch has one, the conspicuous messages before it as well."""
    ordered, ordered_scores = chain_order(alarms), chain_order(scores)
    alarm_follows = np.logical_or.accumulate(ordered[::-1], axis=0)[::-1]
    led = np.count_nonzero(alarm_follows, axis=2)
    mean_score = exact.total(np.where(alarm_follows, ordered_scores, 0.0)) / np.maximum(led, 1)
    traced = ordered | (alarm_follows & (mean_score >= CONSPICUOUS)[:, :, None])
    return _by_link(traced)


def followers(events: np.ndarray) -> np.ndarray:
    """Messages that come after an event (bool [2, L, C, M]) on their micro-batch's way."""
    ordered = chain_order(events)
    after = np.zeros_like(ordered)
    after[1:] = np.logical_or.accumulate(ordered, axis=0)[:-1]
    return _by_link(after)


def first_events(events: np.ndarray) -> np.ndarray:
    """Keep of the events (bool [2, L, C, M]) only the first on each micro-batch's way."""
    ordered = chain_order(events)
    first = ordered & (np.cumsum(ordered, axis=0) == 1)
    return _by_link(first)
