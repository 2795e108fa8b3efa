"""What the replicas of a stage say of one of them, where nobody else can see what it sent."""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.mesh import Worker


def complained_of(said_SR: np.ndarray) -> tuple[Worker, ...]:
    """The workers that more than half of the other replicas of their stage complain of.

    Fewer than half of a stage's replicas are bad, so neither can they have an honest one named, nor keep one of their
    own from it. A stage with one replica has nobody else: it speaks for itself.

    Args:
        said_SR: int, 1 + the replica complained of, or 0.
    """
    replicas = said_SR.shape[1]
    against_SRR = said_SR[:, :, None] == 1 + np.arange(replicas)
    if replicas > 1:
        against_SRR &= ~np.eye(replicas, dtype=bool)
    named_SR = 2 * np.count_nonzero(against_SRR, axis=1) > max(replicas - 1, 1)
    return tuple(Worker(stage, replica) for stage, replica in np.argwhere(named_SR).tolist())
