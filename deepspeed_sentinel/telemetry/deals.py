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
    """All deals of a run, the first of which is DeepSpeed's own wiring from step 0 on."""
    found: list[Deal] = []
    step, wiring, convicted = 0, identity(mesh), np.zeros((mesh.stages, mesh.replicas), bool)

    def as_of_now() -> Deal:
        return Deal(step, wiring, np.asarray(np.take_along_axis(convicted, wiring, 1).any(0)))

    for event in events:
        if event["kind"] in ("conviction", "release"):
            convicted[event["stage"], event["replica"]] = event["kind"] == "conviction"
        elif event["kind"] == "wiring":
            found.append(as_of_now())
            columns = columns_of(wiring)
            for stage, replica, _, column in event["moved"]:
                columns[stage, replica] = column
            step, wiring = event["step"], np.argsort(columns, axis=1)
    return [*found, as_of_now()]
