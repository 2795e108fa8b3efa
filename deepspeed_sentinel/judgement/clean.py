"""Which of a step's messages baselines and maps may learn from.

What precedes the first event on a column's way (``blame.py``) is what it would have been without that event, so it
stays clean: where a quarter of every stage is bad, hardly a column has no event at all, and what is known of honest
stages would soon be out of date. Not clean are

* all messages of a column, of any micro-batch, behind the first event of one of its micro-batches, and that event;
* what the sender of that event sent before it, over another link, and all behind that; of a dispute both who say
  different things, the two ends of the link or the two neighbours of its sender;
* what a convicted worker sent, and all behind it, unless that leaves nothing on a link.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.judgement.blame import followers
from deepspeed_sentinel.mesh import BACKWARD, FORWARD


def clean_links(
    blamed: np.ndarray, disputes: np.ndarray, contested: np.ndarray, events: np.ndarray, convicted: np.ndarray
) -> np.ndarray:
    """Links of whose messages all are clean, bool [2, L, C].

    Args:
        blamed: bool [2, L, C, M], messages that are blamed.
        disputes: bool [2, L, C, M], disputes with nothing before them.
        contested: bool [2, L, C, M], where the neighbours of a message's sender differ about it.
        events: bool [2, L, C, M], all alarms and disputes that leave a column out.
        convicted: bool [S, C], where the worker that serves a column is convicted.
    """
    if not (events.any() or convicted.any() or blamed.any() or disputes.any()):
        return np.ones((*blamed.shape[:3],), bool)
    disputed = np.asarray(disputes.any(-1))
    named = np.asarray(blamed.any(-1)) | disputed
    doubtful = np.zeros_like(convicted)
    doubtful[:-1] |= named[FORWARD] | disputed[BACKWARD]
    doubtful[1:] |= named[BACKWARD] | disputed[FORWARD]
    # One neighbour of a sender receives the message, the other stands before it on the way.
    by_neighbours = np.asarray((contested & disputes).any(-1))
    doubtful[:-2] |= by_neighbours[FORWARD, 1:]
    spoilt = events.any(-1) | sent_by(doubtful)
    clean = ~_with_followers(spoilt)
    without_convicted = clean & ~_with_followers(sent_by(convicted))
    return np.asarray(np.where(without_convicted.any(-1, keepdims=True), without_convicted, clean))


def sent_by(workers_SC: np.ndarray) -> np.ndarray:
    """What is said of workers, [S, C] of any type, by the links over which they send, [2, L, C]."""
    return np.array([workers_SC[:-1], workers_SC[1:]])


def _with_followers(links: np.ndarray) -> np.ndarray:
    marked = links[..., None]
    return np.asarray((marked | followers(marked))[..., 0])
