"""Workers, links, columns and wirings of a pipeline with replicas: plain data, no communication.

A wiring says who serves which column: int64 [S, C], in row s the replica of stage s that serves each column, every one
once. The identity is DeepSpeed's own. First and last stage never move, since they load the data: their rows are always
0, 1, 2, ... Worked example, 4 stages x 3 replicas, where replicas 0 and 2 of stage 1 have changed places:

    0 1 2        column 0 is the chain of workers (0, 0), (1, 2), (2, 0), (3, 0);
    2 1 0        replica 0 of stage 1 serves column 2
    0 1 2
    0 1 2
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FORWARD, BACKWARD = 0, 1
DIRECTIONS = ("forward", "backward")
NAMED = re.compile(r"worker \(stage (\d+), replica (\d+)\)")  # a worker in a text, as ``str`` has it


class Worker(NamedTuple):
    """One position of the mesh: pipeline index and data-parallel index."""

    stage: int
    replica: int

    def __str__(self) -> str:
        return f"worker (stage {self.stage}, replica {self.replica})"


@dataclass(frozen=True)
class Mesh:
    """All workers of a run. Link ``l`` lies between stage ``l`` and stage ``l + 1``.

    Column ``c`` is the chain of workers ``(s, wiring[s, c])``.

    Raises:
        ValueError: with fewer than two stages there is no link, so nothing to watch.
    """

    stages: int
    replicas: int

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(
                f"sentinel needs at least 2 pipeline stages, got {self.stages}: with one stage no message "
                'crosses a link. Cut the model into more stages or set "sentinel": {"enabled": false}.'
            )
        if self.replicas < 1:
            raise ValueError(f"sentinel needs at least 1 replica, got {self.replicas}.")

    @property
    def links(self) -> int:
        return self.stages - 1

    def sender_stage(self, direction: int, link: int) -> int:
        """The stage that produces what crosses ``link`` in ``direction``."""
        return link if direction == FORWARD else link + 1

    def receiver_stage(self, direction: int, link: int) -> int:
        """The stage that takes what crosses ``link`` in ``direction``."""
        return link + 1 if direction == FORWARD else link

    def is_trusted(self, stage: int) -> bool:
        """First and last stage hold the data and the loss and are trusted, as in arXiv 2603.03592."""
        return stage in (0, self.stages - 1)

    def neighbours_are_trusted(self, stage: int) -> bool:
        """Both workers beside a middle stage's are trusted, so what they report of it needs no second look."""
        return self.is_trusted(stage - 1) and self.is_trusted(stage + 1)


def workers_of(marked: np.ndarray) -> tuple[Worker, ...]:
    """Those that are true of a bool [S, R]; of one of any other shape nobody may be."""
    if not marked.any():
        return ()
    stages, replicas = marked.nonzero()
    return tuple(map(Worker, stages.tolist(), replicas.tolist()))


def identity(mesh: Mesh) -> np.ndarray:
    """DeepSpeed's own wiring, int64 [S, C]: replica ``c`` of every stage serves column ``c``."""
    return np.tile(np.arange(mesh.replicas), (mesh.stages, 1))


def columns_of(wiring: np.ndarray) -> np.ndarray:
    """The other way round, int64 [S, R]: the column that each worker serves."""
    return np.argsort(wiring, axis=1)


def changed_links(before: np.ndarray, wiring: np.ndarray) -> np.ndarray:
    """Links of a column of which an end is another worker than before, bool [L, C], from two wirings [S, C]."""
    moved_SC = before != wiring
    return np.asarray(moved_SC[:-1] | moved_SC[1:])


def check_wiring(mesh: Mesh, wiring: np.ndarray) -> None:
    """Raise ValueError for what is no wiring of this mesh."""
    expected = identity(mesh)
    if wiring.dtype.kind not in "iu":
        raise ValueError(f"a wiring is of whole numbers, got {wiring.dtype}")
    if wiring.shape != expected.shape:
        raise ValueError(f"a wiring of this mesh is {list(expected.shape)} (stages, columns), got {list(wiring.shape)}")
    if not (np.sort(wiring, axis=1) == expected).all():
        raise ValueError(f"each row of a wiring names every replica once, got {wiring.tolist()}")
    if not (wiring[[0, -1]] == expected[[0, -1]]).all():
        raise ValueError(f"first and last stage never move, got {wiring[[0, -1]].tolist()}")
