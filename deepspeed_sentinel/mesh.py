"""Workers, links and columns of a pipeline with replicas: plain data, no communication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

FORWARD, BACKWARD = 0, 1
DIRECTIONS = ("forward", "backward")


class Worker(NamedTuple):
    """One position of the mesh: pipeline index and data-parallel index."""

    stage: int
    replica: int

    def __str__(self) -> str:
        return f"worker (stage {self.stage}, replica {self.replica})"


@dataclass(frozen=True)
class Mesh:
    """All workers of a run. Link ``l`` lies between stage ``l`` and stage ``l + 1``.

    Column ``c`` is the chain of workers ``(0, c), (1, c), ...``: replica ``c`` of every stage.

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
