"""The evidence of a step: all that the judge is given, numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from deepspeed_sentinel.evidence.table import TABLE, Rows
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, identity


@dataclass(frozen=True)
class Twins:
    """What is known of a twin step beside its messages.

    Attributes:
        source: the replica whose micro-batches were given to others.
        given: bool [C], the columns that were given them, its own among them.
        gradients: int64 [S, R], a digest of the gradients that each worker has accumulated, before any reduction; 0
            where there is none.
        norms: float64 [S, R], the norm of these gradients.
        kinds: int64 [S, R], equal numbers for equal kinds of hardware and software.
        states: int64 [S, R], of each stage equal numbers other than 0 for workers whose modules held the same when the
            step began, beside their parameters; 0 where its replicas were in states of their own. None where all held
            the same.
    """

    source: int
    given: np.ndarray
    gradients: np.ndarray
    norms: np.ndarray
    kinds: np.ndarray
    states: np.ndarray | None = None


@dataclass(frozen=True)
class Evidence:
    """What both ends of every link report on every message of one step.

    Attributes:
        mesh: the workers it is about.
        step: the engine's global step.
        statistics: float32 or 64 [2 ends, 2 directions, links, columns, micro-batches, P * len(TABLE)], laid out as
            ``Rows``; NaN where a statistic is not available. Ends are SENT and RECEIVED; of rows ``of_pair`` RECEIVED
            is what the receiver reports, SENT what the sender's neighbour on the other side does. What is given of the
            pairs of the first and the last stage, which have none, is made NaN. Rows ``by_judge`` hold nothing.
        digests: int64 [2 ends, 2 directions, links, columns, micro-batches, tensors], one for each tensor of a
            message in its order, of any kind; 0 where there is none.
        dealt: int [S, C], the replica of each stage that served each column in this step, or None where replica
            ``c`` served column ``c``, as in DeepSpeed.
        renewed: bool [2, S, C], by direction, where statistics of the pair around a stage that rest on what was learnt
            are measured in another projection than in the step before; None is nowhere.
        twins: of a twin step; None of any other.
        refused: it was to be a twin step, and the data could not be dealt so.
        keyed: int64 [2 directions, links, columns, micro-batches], a digest of each message by its receiver, under a
            key that the stage of its sender does not know; None where there are no keys.
    """

    mesh: Mesh
    step: int
    statistics: np.ndarray
    digests: np.ndarray
    dealt: np.ndarray | None = None
    renewed: np.ndarray | None = None
    twins: Twins | None = None
    refused: bool = False
    keyed: np.ndarray | None = None

    @cached_property
    def served(self) -> np.ndarray:
        """int [S, C], who served each column."""
        return identity(self.mesh) if self.dealt is None else self.dealt

    def __post_init__(self) -> None:
        assert self.served.shape == (self.mesh.stages, self.mesh.replicas), self.served.shape
        shape = (2, 2, self.mesh.links, self.mesh.replicas)
        assert self.statistics.shape[:4] == shape, (self.statistics.shape, shape)
        assert self.statistics.shape[5] in range(len(TABLE), 1 << 20, len(TABLE)), self.statistics.shape
        assert self.digests.ndim == 6 and self.digests.shape[:5] == self.statistics.shape[:5], self.digests.shape
        assert self.keyed is None or self.keyed.shape == self.statistics.shape[1:5], self.keyed
        of_pair = Rows(self.statistics.shape[5] // len(TABLE)).of_pair
        for direction, link in ((FORWARD, 0), (BACKWARD, -1)):
            if not np.isnan(self.statistics[:, direction, link][..., of_pair]).all():
                statistics = self.statistics.copy(order="K")
                statistics[:, direction, link] = np.where(of_pair, np.nan, statistics[:, direction, link])
                object.__setattr__(self, "statistics", statistics)
