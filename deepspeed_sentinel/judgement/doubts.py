"""What is not settled about workers after a step: all that the next wiring is made of (``response/dealing.py``)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.mesh import Worker


@dataclass(frozen=True)
class Doubts:
    """Who is to be kept where.

    Attributes:
        packed: bool [S, R], convicted or isolated: to stand in as few columns as can hold them.
        suspects: bool [S, R], workers of middle stages to be tried in a twin step, none of them packed.
        accused: bool [S, R], those of them that are suspected for what they sent.
        untried: bool [S, R], workers of middle stages that nobody suspects and that were not compared when somebody
            was convicted, nor since.
        apart: of each two at least one is bad, and it is not known which: of neighbouring stages or of stages next but
            one, and then they should not serve one column; or of one stage, and then they should not be compared again
            with each other alone.
        isolated: bool [S, R], workers that explain what nobody could be proved for, packed or not; None is nobody.
    """

    packed: np.ndarray
    suspects: np.ndarray
    accused: np.ndarray
    untried: np.ndarray
    apart: tuple[tuple[Worker, Worker], ...] = ()
    isolated: np.ndarray | None = None
