"""fp16: a gradient that dynamic loss scaling made non-finite is nobody's fault; a worker may say so of any NaN.

While the loss scale is still sought, honest gradients leave fp16's range now and then. That explains a non-finite
message only

    where it starts:  it is the first non-finite message on its micro-batch's way, and a gradient;
    near the limit:   the finite gradients that entered its stage and left it, of that column and of the median column,
                      reach ``limit * headroom``, each as large as both of its ends say, in this step or the latest
                      that had any. So no worker's report decides, nor that of a minority of the replicas.

A message so explained gives its sender no strike; its column is left out. If more than half of a stage's replicas send
such messages, as both ends of the link say, the scale is too large for all: nobody is left out, the step is skipped and
the scale halved, as the loss scaler would do. Bad workers of several stages cannot stand in for that majority, an
honest worker is always among it; and whoever uses the excuse sees the scale halved, until nothing is near the limit and
the excuse has gone.

Example: limit 100, headroom 1/64. Columns with largest gradients 3, 4, 5, 0.1 around stage 2: the median is 3.5, above
1.6. A NaN that starts at stage 2 is explained in the first three columns and a strike in the fourth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.judgement.blame import followers
from deepspeed_sentinel.judgement.robust import median
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh

# Inside a stage gradients with respect to activations were up to 1.13 times the largest that crossed its links, and 66
# times before the loss is averaged over the tokens (a Llama with one or two layers a stage, 40 steps, 256 tokens).
_HEADROOM, _HEADROOM_OF_LOSS = 2.0**-6, 2.0**-10


@dataclass(frozen=True)
class Explained:
    """What loss scaling explains of a step.

    Attributes:
        overflow: bool [2, L, C, M], non-finite gradients that start there.
        shared: bool [2, L, C, M], those that most replicas of their stage have by both ends, and all that follows them:
            not judged, so the step must be skipped.
    """

    overflow: np.ndarray
    shared: np.ndarray

    @classmethod
    def nothing(cls, messages: tuple[int, ...]) -> Explained:
        """Where no loss scale is sought, of messages of this shape, [2, L, C, M]."""
        return cls(np.zeros(messages, bool), np.zeros(messages, bool))


class Overflow:
    """Tells overflow under dynamic loss scaling from other non-finite messages.

    Args:
        mesh: the mesh judged.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._largest = np.full((mesh.links, mesh.replicas), np.nan)

    def step(self, max_abs: np.ndarray, non_finite: np.ndarray, served: np.ndarray, limit: float) -> Explained:
        """What loss scaling explains of one step.

        Args:
            max_abs: float64 [2 ends, 2, L, C, M], the largest magnitude of each message as reported.
            non_finite: bool [2 ends, 2, L, C, M], messages that each end reports to hold NaN or infinity.
            served: int [S, C], who served each column.
            limit: the magnitude at which an honest gradient overflows, in the unit of ``max_abs``.
        """
        by_any, by_both = non_finite[SENT] | non_finite[RECEIVED], non_finite[SENT] & non_finite[RECEIVED]
        nothing = np.zeros_like(by_any)
        # A magnitude that cannot be is none, whichever end says so, and does not stand in for the other end's.
        said = np.where(np.isfinite(max_abs), max_abs, np.nan)
        largest = np.where(by_any, np.nan, np.fmin(*said))[BACKWARD]
        known = np.fmax.reduce(largest, axis=-1)
        self._largest = np.where(np.isnan(known), self._largest, known)
        if not by_any[BACKWARD].any():
            return Explained(nothing, nothing)
        near = self._near(limit)[..., None]
        overflow, agreed = (self._starts(which, near) for which in (by_any, by_both))
        shared = agreed & self._by_most_replicas(agreed[BACKWARD], served)[:, None, None]
        return Explained(overflow, shared | followers(shared))

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"largest": self._largest.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._largest = np.array(state["largest"])

    @staticmethod
    def _starts(non_finite: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Gradients that are the first on their way, bool [2, L, C, M], near the limit (bool [L, C, 1])."""
        first = non_finite & ~followers(non_finite)
        first[FORWARD] = False
        first[BACKWARD] &= near
        return np.asarray(first)

    def _near(self, limit: float) -> np.ndarray:
        """Links and columns whose sender's gradients are near the limit, bool [L, C]; also where none is known yet."""
        around = self._largest.copy()
        around[:-1] = np.fmax(around[:-1], self._largest[1:])  # what enters the sender crosses the link above
        least = np.full((self._mesh.links, 1), limit * _HEADROOM)
        least[-1] = limit * _HEADROOM_OF_LOSS
        return np.asarray(~(around < least) & ~(median(around)[:, None] < least))

    def _by_most_replicas(self, overflow: np.ndarray, served: np.ndarray) -> np.ndarray:
        """Links over which more than half of the sending stage's replicas overflow (bool [L, C, M]), bool [L]."""
        by_column = np.asarray(overflow.any(-1))
        replicas = [
            (np.unique(of_stage[columns]).size, np.unique(of_stage).size)
            for columns, of_stage in zip(by_column, served[1:], strict=True)
        ]
        return np.array([2 * having > serving for having, serving in replicas])
