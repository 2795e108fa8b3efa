"""Blame: of all that went wrong on a micro-batch's way, the first in the order of the data flow counts.

The way of a micro-batch is forward over links 0 .. L-1, then backward over links L-1 .. 0. Its first alarm points
at the worker that produced that message. What follows is the cascade: neither counted nor learnt from.
"""

from __future__ import annotations

import numpy as np


def chain_order(per_message: np.ndarray) -> np.ndarray:
    """[2, L, C, M] -> [2L, C, M] in the order in which a micro-batch passes."""
    return np.concatenate([per_message[0], per_message[1][::-1]])


def first_events(events: np.ndarray) -> np.ndarray:
    """Keep of the events (bool [2, L, C, M]) only the first on each micro-batch's way."""
    ordered = chain_order(events)
    first = ordered & (np.cumsum(ordered, axis=0) == 1)
    links = events.shape[1]
    return np.stack([first[:links], first[links:][::-1]])
