"""From recorded events: who served which column, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepspeed_sentinel.mesh import Mesh, columns_of, identity


@dataclass(frozen=True)
class Deal:
    """What held from one dealing of columns to the next.

    Attributes:
        step: the first step of it.
        wiring: int64 [S, C].
        lost: bool [C], columns that a convicted worker serves, as of the last step of it.
    """

    step: int
    wiring: np.ndarray
    lost: np.ndarray


def deals(events: Iterable[Mapping[str, Any]], mesh: Mesh) -> list[Deal]:
    """All deals of the events, the first of which is DeepSpeed's own wiring from step 0 on.

    A folder holds the events of a run and of those that went on from it: each of them starts with DeepSpeed's own, and
    what it takes over from a checkpoint is told as moves from there. Who was convicted stays so.
    """
    found: list[Deal] = []
    step, wiring, convicted = 0, identity(mesh), np.zeros((mesh.stages, mesh.replicas), bool)

    def as_of_now() -> Deal:
        return Deal(step, wiring, np.asarray(np.take_along_axis(convicted, wiring, 1).any(0)))

    for event in events:
        if event["kind"] in ("conviction", "release", "replaced"):
            convicted[event["stage"], event["replica"]] = event["kind"] == "conviction"
        elif event["kind"] == "wiring":
            if event["step"] != step or not found:
                found.append(as_of_now())
            columns = columns_of(wiring)
            for stage, replica, _, column in event["moved"]:
                columns[stage, replica] = column
            step, wiring = event["step"], np.argsort(columns, axis=1)
        elif event["kind"] == "start" and (wiring != identity(mesh)).any():
            found.append(as_of_now())
            step, wiring = event["step"], identity(mesh)
    return [*found, as_of_now()]
