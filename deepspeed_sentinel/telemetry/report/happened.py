"""What happened, in order: the time line of a run. What goes on from step to step is one entry, with a count."""

from __future__ import annotations

from typing import Any

from deepspeed_sentinel.evidence.table import in_words
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.report.reading import RunFiles
from deepspeed_sentinel.telemetry.report.suspects import name_of

BAD, WARN, GOOD, PLAIN = "bad", "warn", "good", "plain"
_GAP = 20  # steps between two of the same, from which on they are two entries


def timeline(run: RunFiles) -> list[dict[str, Any]]:
    """Entries of "step", "last" (of what goes on), "time" (seconds since 1970), "count", "grade", "text".

    Alarms of one worker, disputes of one pair, columns left out again and again are one entry each, as long as fewer
    than 20 steps lie between.
    """
    entries: list[dict[str, Any]] = []
    going_on: dict[Any, dict[str, Any]] = {}
    for event in run.events:
        said = _said(run, event)
        if said is None:
            continue
        grade, text, key = said
        entry = going_on.get(key) if key else None
        if entry and event["step"] - entry["last"] < _GAP:
            entry["last"], entry["count"] = event["step"], entry["count"] + 1
            continue
        entry = {
            "step": event["step"], "last": event["step"], "time": event["time"], "count": 1, "grade": grade,
            "kind": event["kind"], "text": text,
        }  # fmt: skip
        entries.append(entry)
        if key:
            going_on[key] = entry
    return entries


def _said(run: RunFiles, event: dict[str, Any]) -> tuple[str, str, Any] | None:
    """(grade, text, what it is the same as) of an event; None for what others tell better."""
    kind = event["kind"]
    worker = Worker(event["stage"], event["replica"]) if kind in _WORKER else None
    name = name_of(run, worker) if worker else ""
    if kind == "alarm":
        many = f"{event['direction']} messages over link {event['link']}"
        return WARN, f"ALARM: {name} sent {many} outside the fences: {in_words(event['statistic'])}", (kind, worker)
    if kind == "dispute":
        pair = f"{name_of(run, event['sender'])} and {name_of(run, event['receiver'])}"
        about = f", about {name_of(run, event['about'])}" if event["about"] else ""
        return WARN, f"DISPUTE over link {event['link']}: {pair} report different things{about}", (kind, pair, about)
    if kind == "excluded":
        columns = ", ".join(map(str, event["columns"]))
        return WARN, f"LEFT OUT of the weights: column {columns} of {run.mesh.replicas}", (kind, columns)
    if kind == "proof":
        agree = f"{event['agreeing']} of {event['compared']} workers of its stage"
        return (
            BAD,
            f"PROVED: {name} made other {_OF.get(event['of'], '')} of the same data than {agree}",
            (kind, worker),
        )
    if kind == "difference":
        names = "; ".join(name_of(run, one) for one in event["workers"])
        return WARN, f"DIFFERENT without a majority ({event['of']}): {names}", (kind, names)
    if kind == "conviction":
        return BAD, f"CONVICTED: {name}, by {'proof' if event['proved'] else 'statistics'}", None
    if kind == "wiring":
        moves = ", ".join(f"({stage}, {replica}) to column {to}" for stage, replica, _, to in event["moved"][:6])
        more = len(event["moved"]) - 6
        return PLAIN, f"columns dealt anew: {moves}" + (f" and {more} more" if more > 0 else ""), None
    if kind == "weights":
        of = f"stage {event['stage']}" + ("" if event["replica"] is None else f", replica {event['replica']}")
        return BAD, f"WEIGHTS differ: {of} ({event['action']})", (kind, of, event["action"])
    if kind == "poisoned":
        return BAD, f"REDUCTION altered in stages {', '.join(map(str, event['stages']))}: step not applied", (kind,)
    if kind == "device":
        why = "proved before to compute wrongly" if event["why"] == "proof" else "in alarm more often than its peers"
        return WARN, f"DEVICE {event['device']} ({event['place']}): {why}", None
    if kind == "isolated":
        names = "; ".join(name_of(run, one) for one in event["workers"])
        return WARN, f"ISOLATED, unproved: {names}" if names else "nobody is isolated any more", None
    if kind == "replaced":
        return PLAIN, f"{event['before']}, convicted before, is not here: {name} is in its place", None
    if kind == "halt":
        return BAD, f"HALT: {event['reason']}", None
    return _SIMPLE[kind](name) if kind in _SIMPLE else None


_OF = {"forward": "forward messages", "backward": "backward messages", "gradients": "gradients of weights"}
_WORKER = {
    "alarm",
    "proof",
    "conviction",
    "suspicion",
    "contradicted",
    "cleared",
    "release",
    "replay",
    "misfit",
    "replaced",
}
_SIMPLE: dict[str, Any] = {
    "start": lambda name: (PLAIN, "watching begins", None),
    "suspicion": lambda name: (WARN, f"SUSPECT: {name}", None),
    "contradicted": lambda name: (BAD, f"PROVED: {name} contradicts more workers of one stage than can be bad", name),
    "cleared": lambda name: (GOOD, f"CLEARED: {name} does what its stage does", None),
    "release": lambda name: (GOOD, f"RELEASED: {name}, on probation", None),
    "replay": lambda name: (BAD, f"PROVED: {name} made two things of the same step", ("replay", name)),
    "misfit": lambda name: (WARN, f"MISFIT: {name} told a mean that its messages cannot have", ("misfit", name)),
    "skipped": lambda name: (WARN, "optimizer did not step", ("skipped",)),
    "twins": lambda name: (PLAIN, "twin step: columns get the same data", ("twins",)),
    "end": lambda name: (PLAIN, "the run ends", None),
}
