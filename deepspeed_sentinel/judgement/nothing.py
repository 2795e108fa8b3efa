"""Micro-batches without a gradient: all labels ignored, so the last stage sends exact zeros.

Such a message carries nothing to judge, and honest stages make exact zeros of it. So nothing that a micro-batch sends
backward is judged by its statistics then, and a stage that makes something of nothing is in alarm, unless it is one
that adds a gradient of its own (the loss that balances a router, say). Zeros that do not come from the last stage are
judged as any other message.

Whether a message is zero both of its ends say. If one alone says so they are in dispute, and what crossed was zero if
its checksum, on which both agree, is that of zeros: what a worker is accused of never hangs on one partner's word.

Which stages add is learnt in the warm-up. Later most of *all* replicas of a stage decide it, each by what it was last
seen to do. A stage of which neither is decided, or which was found to do both, gets no strike; the column is left out.

Example, three replicas of a stage of which nothing is known: replica 0 makes something of nothing: its column is left
out. Replicas 1 and 2 keep zeros: decided, it keeps them. Replica 0 makes something again: a strike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.evidence.table import RECEIVED, SENT, ZEROS, Rows
from deepspeed_sentinel.judgement.replicas import most, of_replicas
from deepspeed_sentinel.judgement.reports import Reports
from deepspeed_sentinel.mesh import BACKWARD, Mesh

_KEEPS, _ADDS = -1, 1
_MAX_ABS = Rows.all_of("max_abs")


@dataclass(frozen=True)
class Made:
    """What a step has shown, each bool [L, C, M] of gradients.

    Attributes:
        void: they carry nothing, or are made of what does.
        made: made of nothing, by a stage that is not known to add.
        open: those of them that are no strike, since it is not known not to add either.
        disputed: one end says that it is zero and the other that it is not.
    """

    void: np.ndarray
    made: np.ndarray
    open: np.ndarray
    disputed: np.ndarray


class Nothing:
    """Which messages carry nothing, and which stages may make something of it.

    Args:
        mesh: the mesh judged.
    """

    def __init__(self, mesh: Mesh) -> None:
        middle = max(mesh.stages - 2, 0)
        self._does = np.zeros(middle, np.int64)  # as decided
        self._added = np.zeros(middle, bool)  # it was once decided that it adds
        self._last = np.zeros((middle, mesh.replicas), np.int64)  # what each worker did of late

    def step(self, reports: Reports, digests: np.ndarray, served: np.ndarray, warming_up: bool) -> Made:
        """Look at a step.

        Args:
            reports: statistics as reported.
            digests: int64 [2 ends, 2, L, C, M, T], as reported.
            served: int [S, C], who served each column.
            warming_up: what is made of nothing is learnt, not held against anybody.
        """
        ends = (reports.received,) if reports.alike else (reports.received, reports.sent)
        if all((end[_MAX_ABS, BACKWARD] != 0).all() for end in ends):
            nowhere = np.zeros(reports.received.shape[2:], bool)
            return Made(nowhere, nowhere, nowhere, nowhere)
        received = _zero(reports.received[:, BACKWARD])
        said = np.stack([received if reports.alike else _zero(reports.sent[:, BACKWARD]), received])
        disputed = np.asarray(said[SENT] != said[RECEIVED])
        zero = said.all(0) | (disputed & _zero_by_digest(digests[:, BACKWARD]))
        void = np.broadcast_to(zero[-1:], zero.shape)
        made = np.zeros_like(zero)
        if not zero[-1].any():
            return Made(void, made, made, disputed)
        given = zero[1:] & void[1:]
        made[:-1] = given & ~said[:, :-1].any(0)
        self._learn(made[:-1].any(-1), (given & zero[:-1]).any(-1), served[1:-1], warming_up)
        made[:-1] &= (self._does != _ADDS)[:, None, None]
        undecided = np.zeros_like(made)
        undecided[:-1] = made[:-1] & ((self._does != _KEEPS) | self._added)[:, None, None]
        return Made(void, made, undecided, disputed)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"does": self._does.copy(), "added": self._added.copy(), "last": self._last.copy()}

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of what may be negative in a state."""
        return dict.fromkeys(("does", "last"), (float(min(_ADDS, _KEEPS)), float(max(_ADDS, _KEEPS))))

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._does, self._added = np.array(state["does"]), np.array(state["added"])
        self._last = np.array(state["last"])

    def _learn(self, makes: np.ndarray, keeps: np.ndarray, served: np.ndarray, warming_up: bool) -> None:
        """Decide what most replicas do, of columns (bool [S - 2, C]) in which something was made or zeros were kept."""
        replicas = self._last.shape[1]
        made, kept = (of_replicas(columns, served, replicas) for columns in (makes, keeps))
        self._last = np.where(made, _ADDS, np.where(kept, _KEEPS, self._last))
        # A single replica that was seen to keep zeros has nobody to tell that they all stopped.
        adds = most(self._last == _ADDS) & ((replicas > 1) | (self._does != _KEEPS) | self._added)
        if warming_up:
            adds = adds | made.any(-1)
        self._does = np.where(adds, _ADDS, np.where(most(self._last == _KEEPS), _KEEPS, self._does))
        self._added = self._added | (self._does == _ADDS)


def _zero(statistics: np.ndarray) -> np.ndarray:
    """Messages [...] of rows [P * K, ...] all of whose parts are exactly zero."""
    largest = np.fmax.reduce(statistics[_MAX_ABS], axis=0)
    broken = np.fmax.reduce(statistics[Rows.all_of("non_finite")], axis=0)
    return np.asarray((largest == 0) & (broken == 0))


def _zero_by_digest(digests: np.ndarray) -> np.ndarray:
    """Messages [...] of digests [2 ends, ..., T] all of whose tensors are zeros by both ends' checksums.

    Only where the two ends differ does this tell: checksums of other tensors can be made the same. Zeros with a sign
    have another one.
    """
    there = digests[SENT] != 0
    zeros = (digests[SENT] == digests[RECEIVED]) & (~there | (digests[SENT] == ZEROS))
    return np.asarray(there.any(-1) & zeros.all(-1))
