"""Reads what a run left: ``events.jsonl``, ``ledger.json``, ``exclude.json``. Keeps what fits, tells what does not.

A line is kept if it is of a known kind and each field has the type that ``telemetry.events`` gives it, inside the mesh.
So whoever reads the result need not look again: a field that is missing and may be, or a number that is not finite,
is None, and every worker is one of the mesh. What is a text is anybody's text.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deepspeed_sentinel.mesh import Mesh, Worker
from deepspeed_sentinel.telemetry.book import DRILL_FILE, FILE
from deepspeed_sentinel.telemetry.events import EVENTS, SCHEMA_VERSION, Event
from deepspeed_sentinel.telemetry.report.fitting import UNREADABLE, fit, place_in, whole

EVENTS_FILE, EXCLUDE_FILE = "events.jsonl", "exclude.json"
_MOST_WORKERS = 1 << 16
# What stands for a field that a line of another version lacks. Without a number, such as a stage, nothing can be told.
NOT_TOLD = "not told"
_ABSENT: dict[Any, Any] = {
    str: NOT_TOLD, bool: None, float: None, types.UnionType: None, list: [], tuple: [], dict: {},
}  # fmt: skip
_SHAPES = {kind: typing.get_type_hints(shape) for kind, shape in EVENTS.items()}


@dataclass(frozen=True)
class RunFiles:
    """One run, and what else its folder knows.

    Attributes:
        folder: where it was read.
        run_id: of the run; "" where its lines have none.
        mesh: its mesh.
        events: its lines, in order; see the module's docstring.
        places: where each worker runs, in its own words: fields of ``who.Place``, each a text, a number or None.
        earlier: of the runs before it in the same file, their id, mesh, first and last time, and who was convicted.
        exclude: what ``exclude.json`` holds, or {}; {} too for a run that others followed.
        devices: of each device in ``ledger.json``, or of a drill's, its counts ``total`` and its ``places``.
        notes: what could not be read, in words.
    """

    folder: Path
    run_id: str
    mesh: Mesh
    events: list[dict[str, Any]]
    places: dict[Worker, dict[str, Any]]
    earlier: list[dict[str, Any]]
    exclude: dict[str, Any]
    devices: dict[str, dict[str, Any]]
    notes: list[str]

    def has(self, worker: Any) -> bool:
        """Whether that is (stage, replica) of its mesh; it may be anything."""
        return fit(list(worker), Worker, "", self.mesh) is not UNREADABLE


def read_run(folder: Path, run_id: str | None = None) -> RunFiles:
    """A run of a folder, by default the last that its events tell of.

    Args:
        folder: the run's ``output_dir``, or its ``events.jsonl``.
        run_id: which, where the file holds several.

    Raises:
        ValueError: there are no events, or none of that run.
        OSError: they cannot be read.
    """
    folder = folder.parent if folder.name == EVENTS_FILE else folder
    path = folder / EVENTS_FILE
    if not path.is_file():
        raise ValueError(
            f'no {EVENTS_FILE} in {folder}: give the "output_dir" of a run. With "events": "none" it writes no file'
        )
    notes: list[str] = []
    runs = _by_run(_objects(path, notes))
    if not runs:
        raise ValueError(f"{path} has no line that can be read: {'; '.join(notes) or 'it is empty'}")
    chosen = list(runs)[-1] if run_id is None else run_id
    if chosen not in runs:
        raise ValueError(f"--run {run_id}: {path} tells of {', '.join(runs)}")
    order = list(runs)
    mesh = _mesh_of(runs[chosen], notes)
    events = list(_fitting(runs[chosen], mesh, notes))
    return RunFiles(
        folder,
        chosen,
        mesh,
        events,
        _places(events),
        [_earlier(one, runs[one]) for one in order[: order.index(chosen)]],
        _json_object(folder / EXCLUDE_FILE, notes) if chosen == order[-1] else {},
        _devices(_json_object(folder / (DRILL_FILE if injecting(events) else FILE), notes)),
        notes,
    )


def injecting(events: Iterable[Mapping[str, Any]]) -> bool:
    """Whether faults were injected on purpose, as the events of a run say."""
    return any(event["kind"] == "start" and event["injecting"] for event in events)


def _objects(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    found, broken, later = [], [], Counter[str]()
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        one = _parsed(line)
        if not isinstance(one, dict) or not isinstance(one.get("kind"), str) or not whole(one.get("step")):
            broken.append(number)
            continue
        schema = one.get("schema_version")
        if schema != SCHEMA_VERSION:
            later["none" if schema is None else repr(schema)[:20]] += 1
        found.append(one)
    if broken == [len(lines)]:
        notes.append(f"the last line of {path.name} is torn: the run was writing it, or ended in the middle of it")
    elif broken:
        notes.append(f"{_count(broken, 'line')} of {path.name} cannot be read, the first is line {broken[0]}")
    for schema, count in later.items():
        notes.append(
            f"{count} lines of {path.name} have schema_version {schema}, and this version knows {SCHEMA_VERSION}: "
            "read as far as they fit; what they say may mean something else"
        )
    return found


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _by_run(objects: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Lines by the run that wrote them, in the order in which runs began. Lines without an id: from start to start."""
    runs: dict[str, list[dict[str, Any]]] = {}
    unnamed = 0
    for one in objects:
        run = one.get("run_id")
        if not isinstance(run, str):
            unnamed += one["kind"] == "start"
            run = f"unnamed-{max(unnamed, 1)}"
        runs.setdefault(run, []).append(one)
    return runs


def _mesh_of(lines: list[dict[str, Any]], notes: list[str]) -> Mesh:
    """As its start says, or, where that line is lost, the smallest that all lines fit into."""
    for one in lines:
        mesh = _mesh(one.get("mesh")) if one["kind"] == "start" else None
        if mesh:
            return mesh
    stages, replicas = 2, 1
    for one in lines:
        for worker in (one, *(one["who"] if isinstance(one.get("who"), list) else ())):
            stage, replica = (worker.get(name) if isinstance(worker, dict) else None for name in ("stage", "replica"))
            if whole(stage) and whole(replica) and (stage + 1) * (replica + 1) <= _MOST_WORKERS:
                stages, replicas = max(stages, stage + 1), max(replicas, replica + 1)
    notes.append(f"the run's start is not told: its mesh is taken for {stages} stages x {replicas} replicas")
    return Mesh(stages, replicas)


def _mesh(said: Any) -> Mesh | None:
    stages, replicas = (said.get(name) if isinstance(said, dict) else None for name in ("stages", "replicas"))
    if not whole(stages) or not whole(replicas) or not (stages >= 2 and replicas >= 1):
        return None
    return Mesh(stages, replicas) if stages * replicas <= _MOST_WORKERS else None


def _fitting(lines: list[dict[str, Any]], mesh: Mesh, notes: list[str]) -> Iterator[dict[str, Any]]:
    unknown, unfit = Counter[str](), Counter[str]()
    for one in lines:
        shape = EVENTS.get(one["kind"])
        if shape is None:
            unknown[one["kind"][:40]] += 1
            continue
        event = _event(one, shape, mesh)
        if event is None:
            unfit[one["kind"]] += 1
        else:
            yield event
    if unknown:
        notes.append(f"left out, of kinds that this version does not know: {_counted(unknown)}")
    if unfit:
        notes.append(f"left out, since a field is missing or is not what docs/events.md says: {_counted(unfit)}")


def _event(one: dict[str, Any], shape: type[Event], mesh: Mesh) -> dict[str, Any] | None:
    hints = _SHAPES[one["kind"]]
    read = {
        field.name: fit(one[field.name], hints[field.name], field.name, mesh)
        if field.name in one
        else _ABSENT.get(typing.get_origin(hints[field.name]) or hints[field.name], UNREADABLE)
        for field in fields(shape)
    }
    if any(value is UNREADABLE for value in read.values()):
        return None
    when, who = one.get("time"), one.get("who")
    return {
        **read,
        "kind": one["kind"],
        "step": one["step"],
        "time": float(when) if isinstance(when, (int, float)) and 0 <= when < 253402300799 else None,
        "who": [place for said in (who if isinstance(who, list) else ()) if (place := place_in(said, mesh))],
    }


def _places(events: list[dict[str, Any]]) -> dict[Worker, dict[str, Any]]:
    return {Worker(one["stage"], one["replica"]): one for event in events for one in event["who"]}


def _earlier(run_id: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    mesh = _mesh_of(lines, [])
    events = list(_fitting(lines, mesh, []))
    times = [event["time"] for event in events if event["time"] is not None]
    return {
        "run_id": run_id,
        "mesh": [mesh.stages, mesh.replicas],
        "begun": min(times, default=None),
        "ended": max(times, default=None),
        "convicted": [[one["stage"], one["replica"]] for one in events if one["kind"] == "conviction"],
    }


def _json_object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        read = _parsed(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(read, dict):
        notes.append(f"{path.name} is no JSON object, and is left out")
        return {}
    return read


def _devices(ledger: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name, those whose counts are whole numbers."""
    devices = ledger.get("devices")
    return {
        key: {"total": one["total"], "places": one.get("places") if isinstance(one.get("places"), list) else []}
        for key, one in (devices.items() if isinstance(devices, dict) else ())
        if isinstance(one, dict) and isinstance(one.get("total"), dict) and all(map(whole, one["total"].values()))
    }


def _count(found: list[int], what: str) -> str:
    return f"{len(found)} {what}{'s'[: len(found) > 1]}"


def _counted(what: Counter[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in what.most_common(8))
