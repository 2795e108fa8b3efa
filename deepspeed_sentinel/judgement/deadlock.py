"""Steps in a row in which every column is left out and nobody is found: what is done before training stops for them.

Such a step changes no weight and is no example, and where all that stands out is excused as a turn of training
(``centre.py``) it names nobody either, so the next would be the same. After ``PATIENCE`` of them the next steps are
likely to be twin steps, in which exact comparison tells what is true (``proof.py``):

* If it lies beyond the fences as well, training has turned, and columns differ as they never did. For some steps what
  is usual of each column follows that, although the steps are lost.
* If it does not, the turn is made up: bad workers of several stages can be most of those that serve the columns. For a
  while a turn is no excuse then, so that who stands out is struck, tried and isolated as ever.

Where strikes convict the second would convict honest workers, and where no twin step can be made nothing tells the two
apart: what most replicas do is believed then.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.judgement.settings import JudgeSettings
from deepspeed_sentinel.mesh import Mesh

PATIENCE = 3
_FOLLOWED = 8  # steps
_KEPT = ("known", "followed")


class Deadlock:
    """Counts lost steps, and knows what to make of a turn that keeps all columns out.

    Args:
        mesh: the mesh judged.
        rows: (statistics, 2 directions, links).
        settings: how to judge.

    Attributes:
        lost: steps in a row that were skipped and taught nothing: nobody new was suspected, proved or convicted.
    """

    def __init__(self, mesh: Mesh, rows: tuple[int, int, int], settings: JudgeSettings) -> None:
        self._settings = settings
        self.lost = 0
        self._doubted = 0  # steps for which a turn is no excuse
        self._known = np.zeros((mesh.stages, mesh.replicas), bool)  # suspects since the last step that was not skipped
        self._followed = np.zeros(rows, np.int64)  # steps in which a turn is still followed

    @property
    def here(self) -> bool:
        """Whether twin steps are to tell what is true."""
        return self.lost >= max(1, min(PATIENCE, self._settings.max_skipped_steps // 3))

    @property
    def excuses(self) -> bool:
        """Whether a turn of training is an excuse."""
        return self._doubted == 0

    @property
    def followed(self) -> np.ndarray:
        """Statistics in which a turn is to be followed, bool [K, 2, L]."""
        return self._followed > 0

    def learn_truth(self, turned: np.ndarray) -> None:
        """Hear of a twin step; before ``end``.

        Args:
            turned: bool [K, 2, L], statistics whose true values lie beyond the fences.
        """
        if turned.any():
            self._doubted = 0
        if not self.here:
            return
        self._followed = np.where(turned, _FOLLOWED, self._followed)
        if not turned.any() and self._settings.conviction == "proof":
            self._doubted = self._settings.strike_window

    def end(self, lost: bool, suspects: np.ndarray, news: bool, turned: np.ndarray, tries: bool) -> None:
        """Enter a step.

        Args:
            lost: every column was left out of it.
            suspects: bool [S, R], after it.
            news: there is something to act on that was not there before, but for new suspects.
            turned: bool [K, 2, L], statistics in which training seems to have turned.
            tries: twin steps can be made.
        """
        self._doubted = max(self._doubted - 1, 0)
        self._followed = np.maximum(self._followed - 1, 0)
        taught = news or bool((suspects & ~self._known).any())
        self.lost = self.lost + 1 if lost and not taught else 0
        self._known = self._known | suspects if lost else suspects
        if self.here and not tries:
            self._followed = np.where(turned, _FOLLOWED, self._followed)

    def state_dict(self) -> dict[str, np.ndarray]:
        counts = {"lost": np.array(self.lost), "doubted": np.array(self._doubted)}
        return {**counts, **{name: getattr(self, f"_{name}").copy() for name in _KEPT}}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.lost, self._doubted = int(state["lost"]), int(state["doubted"])
        for name in _KEPT:
            setattr(self, f"_{name}", np.array(state[name]))
