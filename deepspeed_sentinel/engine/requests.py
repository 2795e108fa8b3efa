"""Another action while a run goes on: asked for on one rank or on several, and decided on all ranks alike.

What a rank asks for goes with its verdict to all others, as one word, so it costs no collective. It is in effect from
the step after that one: the step in which it is told was judged before.

Who asks may be who cheats, and "observe" is what a cheat would ask for. First and last stage are trusted, so theirs
alone counts, and of theirs that of the lowest rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.config import ACTIONS, Action
from deepspeed_sentinel.engine.controlfile import ControlFile
from deepspeed_sentinel.mesh import Mesh, Worker


@dataclass(frozen=True)
class Decision:
    """What became of the requests of one step.

    Attributes:
        action: from the next step on; None where nobody who is trusted asked.
        by: whose request it was; None with it.
        file: it came from the control file.
        others: who of the trusted asked for another one.
        unheeded: who asked and is not trusted.
    """

    action: Action | None
    by: Worker | None
    file: bool
    others: tuple[tuple[Worker, Action], ...]
    unheeded: tuple[tuple[Worker, Action], ...]


class Requests:
    """Of this rank, until they were told to all others.

    Args:
        mesh: the mesh.
        ranks: int [S, R], the global rank of each worker.
        check: raises ValueError about an action that cannot be asked for.
        file: read on rank 0; None on others.
    """

    def __init__(
        self, mesh: Mesh, ranks: np.ndarray, check: Callable[[str], object], file: ControlFile | None = None
    ) -> None:
        self._mesh, self._check, self._file = mesh, check, file
        places = np.argwhere(ranks >= 0)
        self._workers = [Worker(*place) for place in places[np.argsort(ranks.ravel())].tolist()]
        self._asked = ""
        self._from_file = False

    def ask(self, action: str) -> None:
        """Have it told in the next step; of several the last counts.

        Raises:
            ValueError: it cannot be asked for.
        """
        self._check(action)
        self._asked, self._from_file = action, False

    def take_word(self) -> int:
        """What this rank tells the others, once: 0, or 1 + the number of an action in ``ACTIONS``."""
        found = self._file.read(self._check) if self._file else None
        asked, self._from_file = found or self._asked, found is not None
        self._asked = ""
        return 1 + ACTIONS.index(asked) if asked else 0

    def decide(self, words: np.ndarray) -> Decision | None:
        """What all ranks make of the words of all ranks, int64 [ranks]; None where nobody asked.

        A word that is none counts for nothing.
        """
        asked = [
            (worker, ACTIONS[word - 1])
            for worker, word in zip(self._workers, words.tolist(), strict=True)
            if 0 < word <= len(ACTIONS)
        ]
        if not asked:
            return None
        heard = [one for one in asked if self._mesh.is_trusted(one[0].stage)]
        unheeded = tuple(one for one in asked if one not in heard)
        if not heard:
            return Decision(None, None, False, (), unheeded)
        by, action = heard[0]
        others = tuple(one for one in heard if one[1] != action)
        return Decision(action, by, self._from_file and by == self._workers[0], others, unheeded)
