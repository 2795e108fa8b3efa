"""The files of a run's events, written by rank 0: ``events.jsonl``, and ``health.jsonl`` for health agents."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.events import SCHEMA_VERSION, Conviction, Event, Start
from deepspeed_sentinel.telemetry.health import health_event
from deepspeed_sentinel.telemetry.who import Who

EVENTS_FILE, HEALTH_FILE = "events.jsonl", "health.jsonl"


class EventLog:
    """Appends events to ``events.jsonl`` of a folder, and a record of each conviction to ``health.jsonl``.

    Args:
        folder: where.
        run_id: of all lines that it writes.
        who: names the workers.
        clock: seconds since 1970.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str, run_id: str, who: Who, clock: Callable[[], float] = time.time) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._run_id, self._who, self._clock = run_id, who, clock
        self._file = (path / EVENTS_FILE).open("a", encoding="utf-8")
        self._health = path / HEALTH_FILE
        self._injecting = False

    def write(self, step: int, event: Event) -> None:
        """Append one.

        Raises:
            OSError: it cannot be written.
        """
        now = round(self._clock(), 3)
        self._file.write(strict_json(record(step, event, now, self._run_id, self._who)) + "\n")
        self._file.flush()
        if isinstance(event, Start):
            self._injecting = event.injecting
        elif isinstance(event, Conviction):
            worker = Worker(event.stage, event.replica)
            place, device = self._who(worker), self._who.device(worker)
            told = health_event(event, place, device, step, now, self._run_id, self._injecting)
            with self._health.open("a", encoding="utf-8") as health:
                health.write(strict_json(told) + "\n")

    def close(self) -> None:
        self._file.close()


def record(step: int, event: Event, now: float, run_id: str, who: Who) -> dict[str, Any]:
    """An event as its line holds it.

    Args:
        step: the engine's ``global_steps`` when the step began.
        event: what to tell.
        now: seconds since 1970.
        run_id: of the run.
        who: names the workers.
    """
    head = {"kind": event.kind, "step": step, "time": now, "schema_version": SCHEMA_VERSION, "run_id": run_id}
    own = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return {**head, **own, "who": [dataclasses.asdict(who(worker)) for worker in event.named()]}


def strict_json(value: Any) -> str:
    """JSON as RFC 8259 has it, which knows no NaN and no infinity: such a number is written as null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value
