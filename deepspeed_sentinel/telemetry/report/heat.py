"""Workers x steps as one byte each: how far outside the fences the worst of what a worker sent was.

    level 0       nothing judged, or not recorded
    level 1..255  score on a logarithmic scale from 0.01 to 100; 128 is 1, on the fence

Steps are put together where there are more cells than a page carries: a cell has the largest of its steps.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from deepspeed_sentinel.telemetry.report.reading import RunFiles

_MOST_CELLS = 1 << 21
_DECADES = 2.0
FENCE = 128


def heat(run: RunFiles, first: int, last: int) -> dict[str, Any]:
    """For the page: rows are workers, stage by stage.

    Args:
        run: what to show.
        first, last: steps.

    Returns:
        "first" step, "width" steps a cell, "cells" a row, "levels" base64 of uint8 [S * R, cells]; "out" the same of
        [R, cells], 1 where a column was left out; "marks", [kind, row, step] of alarms, suspicions, proofs,
        convictions, releases; "twins" and "moves" ([row, step, column]); "warm" the last step of warm-up or None.
    """
    stages, replicas = run.mesh.stages, run.mesh.replicas
    span, rows = last - first + 1, stages * replicas
    width = max(1, math.ceil(span * rows / _MOST_CELLS))
    cells = math.ceil(span / width)
    levels, out = np.zeros((rows, cells), np.uint8), np.zeros((replicas, cells), np.uint8)
    marks, twins, moves, warm = [], [], [], None
    for event in run.events:
        kind, step = event["kind"], event["step"]
        if not first <= step <= last:
            continue
        at = (step - first) // width
        if kind == "step" and event["scores"]:
            levels[:, at] = np.maximum(levels[:, at], level(np.array(event["scores"], float).reshape(-1)))
            warm = step if event["warming_up"] else warm
        elif kind == "excluded":
            out[event["columns"], at] = 1
        elif kind in ("alarm", "suspicion", "proof", "conviction", "release"):
            row = event["stage"] * replicas + event["replica"]
            marks.append([kind, row, step])
            if kind == "alarm":
                levels[row, at] = max(levels[row, at], int(level(np.array(event["score"], float))))
        elif kind == "twins":
            twins.append(step)
        elif kind == "wiring":
            moves += [[stage * replicas + replica, step, column] for stage, replica, _, column in event["moved"]]
    return {
        "first": first, "last": last, "width": width, "cells": cells, "stages": stages, "replicas": replicas,
        "levels": base64.b64encode(levels.tobytes()).decode(), "out": base64.b64encode(out.tobytes()).decode(),
        "marks": marks, "twins": twins, "moves": moves, "warm": warm,
    }  # fmt: skip


def level(scores: np.ndarray) -> np.ndarray:
    """uint8 of any shape, from scores of that shape; NaN and 0 are 0."""
    known = np.nan_to_num(scores, nan=0.0)
    scaled = FENCE + (FENCE - 1) / _DECADES * np.log10(np.maximum(known, 1e-9))
    return np.where(known > 0, np.clip(np.rint(scaled), 1, 255), 0).astype(np.uint8)
