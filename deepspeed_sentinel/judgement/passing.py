"""Tensors that pass a stage unchanged: position ids, masks, sums of a stage that adds nothing to them.

No statistic tells altered position ids from others, and whoever computes with them honestly is the one that stands
out. But a stage that handed a tensor on unchanged in every message of the warm-up goes on doing so. Where one does not,
its sender is in alarm: both ends of the link before it agree on what entered, both ends of the link after it on what
left, so nobody's word alone accuses it, and no fence is asked.

Two tensors that entered alike all through the warm-up leave it open which of them leaves where. Where they differ, one
will show it; but one worker may have swapped them. So until more than half of a stage's replicas have shown that it is
not the one, either may be what leaves, and neither accuses anybody.

A tensor that was nothing but zeros through all of the warm-up may be one that is handed on (token types of one kind) or
a count of what did not happen yet (tokens that no expert had room for). Who alters it is in alarm as well, but once
more than half of a stage's replicas have done so, in whichever steps, it was a count, and nothing is held against
anybody for it any more.

Example: tensors (hidden state, position ids) enter with digests (5, 7) and leave with (9, 7). Leaving tensor 1 equals
entering tensor 1, in all messages, so it is expected to. Later (6, 7) enters and (8, 3) leaves: that message is in
alarm.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.evidence.table import ZEROS
from deepspeed_sentinel.judgement.replicas import most, of_replicas
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh


class Passing:
    """Which tensor that leaves a middle stage is one that entered it, per direction.

    Of gradients, zeros teach nothing: where none enters and none leaves, nothing need have been handed on.
    What most columns of a stage no longer do in a step is no rule of the model: it is forgotten, not held against
    them. With a single column there is no majority, so there a difference always counts.

    Args:
        mesh: the mesh judged.
        steps: how many are learnt from before anything is held against anybody.
    """

    def __init__(self, mesh: Mesh, steps: int) -> None:
        self._mesh = mesh
        self._steps = steps
        self._learnt = 0
        self._same = np.ones((2, max(mesh.stages - 2, 0), 0, 0), bool)
        self._seen, self._zeros = np.zeros_like(self._same), np.ones_like(self._same)
        self._elsewhere = np.zeros((*self._same.shape, mesh.replicas), bool)
        self._grown = np.zeros((*self._same.shape[:3], mesh.replicas), bool)

    def step(self, digests: np.ndarray, agreed: np.ndarray, served: np.ndarray) -> np.ndarray:
        """Learn from a step, or hold it against what was learnt.

        Args:
            digests: int64 [2, L, C, M, T], one a tensor, 0 where there is none.
            agreed: bool [2, L, C, M], messages about which both ends report the same.
            served: int [S, C], who served each column.

        Returns:
            int [2, L, C, M]: how many tensors of a message should have been passed on unchanged and were not.
        """
        changed = np.zeros(agreed.shape, np.int64)
        if self._mesh.stages < 3:
            return changed
        tensors = digests.shape[-1]
        if self._same.shape[-1] != tensors:
            self._same, self._learnt = np.ones((*self._same.shape[:2], tensors, tensors), bool), 0
            self._seen, self._zeros = np.zeros_like(self._same), np.ones_like(self._same)
            self._elsewhere = np.zeros((*self._same.shape, self._mesh.replicas), bool)
            self._grown = np.zeros((*self._same.shape[:3], self._mesh.replicas), bool)
        if self._learnt >= self._steps and not (self._same & self._seen).any():
            return changed
        entered, left = entering(digests)[..., :, None], leaving(digests)[..., None, :]
        known = entering(agreed) & leaving(agreed)
        equal = (entered == left) & (entered != 0)  # [2, S - 2, C, M, T entering, T leaving]
        if self._learnt < self._steps:
            if known.any():
                telling = equal & known[..., None, None]
                self._zeros &= ~(telling & (entered != ZEROS)).any(axis=(2, 3))
                telling[BACKWARD] &= entered[BACKWARD] != ZEROS
                self._seen |= telling.any(axis=(2, 3))
                self._same &= (equal | ~known[..., None, None]).all(axis=(2, 3))
                self._learnt += 1
            return changed
        same = (self._same & self._seen)[:, :, None, None]
        passed = (equal & same).any(-2)
        broken = same.any(-2) & ~passed & known[..., None]
        by_replica = self._by_replica(broken.any(3), served)  # [2, S - 2, T leaving, R]
        taught = np.asarray((self._same & self._seen & ~self._zeros).any(-2))
        self._grown = self._grown | (by_replica & ~taught[..., None])
        forgotten = (most(by_replica) | most(self._grown)) & (self._mesh.replicas > 1)
        # Of two tensors that entered alike and are so no longer, one is what leaves.
        elsewhere = (same & ~equal & (passed & known[..., None])[..., None, :]).any(3)
        self._elsewhere = self._elsewhere | self._by_replica(elsewhere, served)
        self._same = self._same & ~forgotten[:, :, None, :] & ~most(self._elsewhere)
        count = np.count_nonzero(broken & ~forgotten[:, :, None, None], axis=-1)
        changed[FORWARD, 1:], changed[BACKWARD, :-1] = count[FORWARD], count[BACKWARD]
        return changed

    def state_dict(self) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {"same": self._same, "seen": self._seen, "zeros": self._zeros}
        arrays |= {"elsewhere": self._elsewhere, "grown": self._grown}
        return {**{name: array.copy() for name, array in arrays.items()}, "learnt": np.array(self._learnt)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._same, self._seen, self._zeros = (np.array(state[name]) for name in ("same", "seen", "zeros"))
        self._elsewhere, self._grown = np.array(state["elsewhere"]), np.array(state["grown"])
        self._learnt = int(state["learnt"])

    def _by_replica(self, by_column: np.ndarray, served: np.ndarray) -> np.ndarray:
        """bool [2, S - 2, C, ...] -> [2, S - 2, ..., R]."""
        moved = np.moveaxis(by_column, (1, 2), (-2, -1))
        return np.moveaxis(of_replicas(moved, served[1:-1], self._mesh.replicas), -2, 1)


def entering(per_link: np.ndarray) -> np.ndarray:
    """[2, L, ...] -> [2, S - 2, ...]: what entered each middle stage."""
    return np.array([per_link[FORWARD, :-1], per_link[BACKWARD, 1:]])


def leaving(per_link: np.ndarray) -> np.ndarray:
    """[2, L, ...] -> [2, S - 2, ...]: what left each middle stage."""
    return np.array([per_link[FORWARD, 1:], per_link[BACKWARD, :-1]])
