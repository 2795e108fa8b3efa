"""The stream of JSON lines from the job to the terminal: rank 0 writes it, the parent reads and folds it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepspeed_sentinel.demo.options import RUNS


def finite(value: float) -> float | None:
    """``value``, or None where it is not finite: JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


class Writer:
    """Appends lines to ``path`` when ``active``; does nothing on the other ranks."""

    def __init__(self, path: Path, active: bool) -> None:
        self._file = path.open("a", encoding="utf-8") if active else None

    def __call__(self, kind: str, **values: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")
            self._file.flush()


class Reader:
    """Returns the lines that were added to ``path`` since the last call; whole lines only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def __call__(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


@dataclass
class RunState:
    """What is known of one run so far. Losses are None where they were not finite; seconds are per step."""

    losses: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    started: bool = False
    ended: bool = False
    final_loss: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    step_guard: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps_per_s(self) -> float | None:
        """Training steps over the time they took, evaluation not included."""
        return len(self.seconds) / sum(self.seconds) if self.seconds else None


@dataclass
class DemoState:
    """All lines folded into one state."""

    message: str = "Starting"
    runs: dict[str, RunState] = field(default_factory=lambda: {name: RunState() for name in RUNS})
    plain_seconds: list[float] = field(default_factory=list)
    guarded_seconds: list[float] = field(default_factory=list)
    done: bool = False

    def apply(self, line: Mapping[str, Any]) -> None:
        """Take in one line.

        Raises:
            ValueError: the line has a kind that this version does not know.
        """
        kind = line["kind"]
        if kind == "message":
            self.message = line["text"]
        elif kind == "run_start":
            self.runs[line["run"]].started = True
        elif kind == "step":
            run = self.runs[line["run"]]
            run.losses.append(line["loss"])
            run.seconds.append(line["seconds"])
            if "guard" in line:
                run.step_guard.append(line["guard"])
        elif kind == "run_end":
            run = self.runs[line["run"]]
            run.ended = True
            run.final_loss = line["final_loss"]
            run.counts = dict(line.get("counts", {}))
        elif kind == "overhead":
            (self.guarded_seconds if line["guarded"] else self.plain_seconds).append(line["seconds"])
        elif kind == "done":
            self.done = True
        else:
            raise ValueError(f"Unknown kind of progress line {kind!r}; the job and its parent must be one version.")


def fold(lines: Iterable[Mapping[str, Any]]) -> DemoState:
    """The state after all ``lines``."""
    state = DemoState()
    for line in lines:
        state.apply(line)
    return state
