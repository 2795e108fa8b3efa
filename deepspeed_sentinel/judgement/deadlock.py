"""Steps in a row in which every column is left out and nobody is found: what is done before training stops for them.

Such a step changes no weight and is no example, and where all that stands out is excused as a turn of training
(``centre.py``) it names nobody either, so the next would be the same. Honest columns can come to that, if all turn at
once and each by another amount; and bad workers of several stages, fewer than half of each, can be most of those that
serve the columns, and make a turn up.

So after ``PATIENCE`` such steps the next ones are likely to be twin steps, and for a while a turn is no excuse: who
stands out is struck, tried, and proved, isolated or cleared as ever, and what lasted of who is cleared is taken for
usual of its column (``standing.py``). Nothing else is learnt of what could not be compared. Where strikes convict, they
would convict honest workers, and a turn stays an excuse.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.judgement.settings import JudgeSettings
from deepspeed_sentinel.mesh import Mesh

PATIENCE = 3


class Deadlock:
    """Counts lost steps.

    Args:
        mesh: the mesh judged.
        settings: how to judge.

    Attributes:
        lost: steps in a row that were skipped and taught nothing: nobody new was suspected, proved or convicted.
    """

    def __init__(self, mesh: Mesh, settings: JudgeSettings) -> None:
        self._window = settings.strike_window
        self._patience = max(1, min(PATIENCE, settings.max_skipped_steps // 3))
        self.lost = 0
        self._loss = 0  # such steps less the others, so that one in three that counts is no way out
        self._doubted = 0  # steps for which a turn is no excuse
        self._known = np.zeros((mesh.stages, mesh.replicas), bool)  # suspects since the last step that was not skipped

    @property
    def here(self) -> bool:
        """Whether twin steps are to tell what is true."""
        return self._loss >= self._patience

    @property
    def excuses(self) -> bool:
        """Whether a turn of training is an excuse."""
        return self._doubted == 0

    def end(self, lost: bool, suspects: np.ndarray, news: bool, strikes_convict: bool) -> None:
        """Enter a step.

        Args:
            lost: every column was left out of it.
            suspects: bool [S, R], after it.
            news: there is something to act on that was not there before, but for new suspects.
            strikes_convict: in some stage, or they may come to.
        """
        taught = news or bool((suspects & ~self._known).any())
        self.lost = self.lost + 1 if lost and not taught else 0
        self._loss = min(self._loss + 1, self._patience) if self.lost else max(self._loss - 1, 0)
        self._known = self._known | suspects if lost else suspects
        self._doubted = max(self._doubted - 1, 0)
        if self.here:
            self._doubted = self._window
        if strikes_convict:
            self._doubted = 0

    def state_dict(self) -> dict[str, np.ndarray]:
        counts = {"lost": np.array(self.lost), "loss": np.array(self._loss), "doubted": np.array(self._doubted)}
        return {**counts, "known": self._known.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.lost, self._loss, self._doubted = (int(state[name]) for name in ("lost", "loss", "doubted"))
        self._known = np.array(state["known"])
