"""The training loss of a run, from what other tools leave: the Trainer's state, a table of steps and losses."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STATE = "trainer_state.json"
_MOST_RUNS, _LONGEST = 6, 40  # colours there are, and characters of a name


def find_loss(folder: Path) -> Path | None:
    """The newest ``trainer_state.json`` in a run's folder, beside it, or in a checkpoint of either."""
    found = [path for base in (folder, folder.parent) for form in (STATE, f"*/{STATE}") for path in base.glob(form)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def read_loss(path: Path, samples_a_step: int = 1) -> dict[str, list[list[float]]]:
    """[step, loss] pairs of each run, in the order of steps; steps as Sentinel counts them, from 0.

    Rows of several runs in one file have a column ``run`` with its name, as the demo's ``progress.jsonl``; without it
    all are of one run, "".

    Args:
        path: ``trainer_state.json`` (whose steps are finished ones, one more), or CSV with a header or JSON lines, in
            which a column ``step`` and one ``loss`` (or whose name ends in it) are read.
        samples_a_step: what a step of the file is to be divided by: DeepSpeed's CSV monitor counts samples.

    Raises:
        ValueError: it has no such columns, or no number in them, or more runs than can be told apart.
        OSError: it cannot be read.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    finished = path.suffix == ".json" or samples_a_step > 1
    rows: Iterable[Any]
    if path.suffix == ".json":
        try:
            state = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        history = state.get("log_history") if isinstance(state, dict) else state
        rows = history if isinstance(history, list) else ()
    elif path.suffix == ".jsonl":
        rows = [row for row in map(_parsed, text.splitlines()) if row is not None]
    else:
        rows = csv.DictReader(text.splitlines())
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        pair = _pair(row)
        if pair:
            of_run = found.setdefault(str(row.get("run") or "")[:_LONGEST], {})
            of_run[pair[0] / samples_a_step - finished] = pair[1]
    if not found:
        raise ValueError(f"{path} has no numbers in columns step and loss: give CSV with a header, or JSON lines")
    if len(found) > _MOST_RUNS:
        raise ValueError(f"{path} holds {len(found)} runs, by its column run: give a file with {_MOST_RUNS} or fewer")
    return {run: [[step, loss] for step, loss in sorted(pairs.items())] for run, pairs in found.items()}


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _pair(row: Any) -> tuple[float, float] | None:
    if not isinstance(row, dict):
        return None
    names = [name for name in row if isinstance(name, str)]
    step = next((row[name] for name in names if name.strip().lower() in ("step", "global_step")), None)
    loss = next((row[name] for name in names if name.strip().lower().endswith("loss")), None)
    try:
        pair = float(step), float(loss)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return pair if all(map(math.isfinite, pair)) and 0 <= pair[0] < 2**53 else None
