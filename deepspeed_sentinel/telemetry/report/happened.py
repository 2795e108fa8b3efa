"""What happened, in order: the time line of a run. What goes on from step to step is one entry."""

from __future__ import annotations

from typing import Any, NamedTuple

from deepspeed_sentinel.evidence.table import in_words
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.report.reading import RunFiles
from deepspeed_sentinel.telemetry.report.suspects import name_of
from deepspeed_sentinel.telemetry.report.words import (
    WHAT,
    contradiction_in_words,
    difference_in_words,
    many,
    plain,
    rest,
    suspicion_in_words,
    weights_in_words,
)

BAD, WARN, GOOD, PLAIN = "bad", "warn", "good", "plain"
_GAP = 20  # steps between two of the same, from which on they are two entries
_MOST_PARTS = 6


class _Said(NamedTuple):
    """What an event says.

    Attributes:
        grade: how bad it is.
        text: what of whom; events that say the same are one entry.
        goes_on: it is of a step, not a change that lasts: told again and again it is one entry.
        part: what else it says, which is counted for itself within the entry.
    """

    grade: str
    text: str
    goes_on: bool = False
    part: str = ""


def timeline(run: RunFiles) -> list[dict[str, Any]]:
    """Entries of "step", "last" (of what goes on), "time" (seconds since 1970), "count", "grade", "text".

    Alarms of one worker, disputes of one pair, columns left out again and again are one entry each, as long as fewer
    than 20 steps lie between. "count" is of steps; the text has it, for each statistic and the like by itself.
    """
    entries: list[dict[str, Any]] = []
    parts_of: list[dict[str, list[int]]] = []
    going_on: dict[str, int] = {}
    for event in run.events:
        said, step = _said(run, event), event["step"]
        if said is None:
            continue
        at = going_on.get(said.text) if said.goes_on else None
        if at is None or step - entries[at]["last"] >= _GAP:
            at = going_on[said.text] = len(entries)
            entries.append(
                {"step": step, "last": step, "time": event["time"], "grade": said.grade, "kind": event["kind"],
                 "text": said.text}
            )  # fmt: skip
            parts_of.append({})
        entries[at]["last"] = step
        steps = parts_of[at].setdefault(said.part, [])
        steps += [step] if step not in steps[-1:] else []
    return [
        {**entry, "count": len(set().union(*parts.values())), "text": _counted(entry["text"], parts)}
        for entry, parts in zip(entries, parts_of, strict=True)
    ]


def _counted(text: str, parts: dict[str, list[int]]) -> str:
    if len(parts) == 1:
        ((part, steps),) = parts.items()
        return text + (f": {part}" if part else "") + (f" (in {many(len(steps), 'step')})" if steps[1:] else "")
    most = sorted(parts.items(), key=lambda one: -len(one[1]))
    told = [
        f"{part}, in {many(len(steps), 'step') if steps[1:] else f'step {steps[0]}'}"
        for part, steps in most[:_MOST_PARTS]
    ]
    left = [step for _, steps in most[_MOST_PARTS:] for step in steps]
    return f"{text}: {'; '.join([*told, *([rest(left)] if left else [])])}"


def _said(run: RunFiles, event: dict[str, Any]) -> _Said | None:
    """None for what others tell better."""
    kind = event["kind"]
    worker = Worker(event["stage"], event["replica"]) if kind in _WORKER else None
    name = name_of(run, worker) if worker else ""
    if kind == "alarm":
        how = _ALARM.get(event["cause"], "that are in alarm")
        part = f"{event['direction']} over link {event['link']}, {in_words(event['statistic'])}"
        return _Said(WARN, f"ALARM: {name} sent messages {how}", True, part)
    if kind == "dispute":
        pair = f"{name_of(run, event['sender'])} and {name_of(run, event['receiver'])}"
        of = f"what entered and left {name_of(run, event['about'])}" if event["about"] else "what crossed it"
        return _Said(WARN, f"DISPUTE over link {event['link']}: {pair} report different things of {of}", True)
    if kind == "excluded":
        columns = ", ".join(map(str, event["columns"]))
        return _Said(WARN, f"LEFT OUT of the weights: column {columns} of {run.mesh.replicas}", True)
    if kind == "suspicion":
        why = suspicion_in_words(event)
        return _Said(WARN, f"SUSPECT: {name}{f': {why}' if why else ''}")
    if kind == "proof":
        text = f"PROVED: {name}, given the same micro-batches, made something else than most of its stage"
        return _Said(BAD, text, True, WHAT.get(event["of"], event["of"]))
    if kind == "contradicted":
        assert worker is not None
        return _Said(BAD, f"PROVED: {contradiction_in_words(worker, event['partners'])}", True)
    if kind == "difference":
        names = "; ".join(name_of(run, one) for one in event["workers"])
        return _Said(WARN, f"DIFFERENT: {difference_in_words(names, event)}", True)
    if kind == "conviction":
        return _Said(BAD, f"CONVICTED: {name}, by {'proof' if event['proved'] else 'statistics'}")
    if kind == "wiring":
        moves = ", ".join(
            f"{plain(str(Worker(stage, replica)))} to column {to}" for stage, replica, _, to in event["moved"][:6]
        )
        more = len(event["moved"]) - 6
        return _Said(PLAIN, f"columns dealt anew: {moves}" + (f" and {more} more" if more > 0 else ""))
    if kind == "weights":
        if event["replica"] is None:
            what = f"replicas of stage {event['stage']} hold different ones, and no majority tells which are right"
        else:
            what = weights_in_words(plain(str(Worker(event["stage"], event["replica"]))), event["action"])
        return _Said(BAD, f"WEIGHTS: {what}", True)
    if kind == "poisoned":
        stages = ", ".join(map(str, event["stages"]))
        what = f"gradients of stage {stages} were reduced to something else than they must be"
        return _Said(BAD, f"REDUCTION: {what}: step not applied", True)
    if kind == "device":
        why = "proved before to compute wrongly" if event["why"] == "proof" else "in alarm more often than its peers"
        return _Said(WARN, f"DEVICE {event['device']} ({event['place']}): {why}")
    if kind == "isolated":
        names = "; ".join(name_of(run, one) for one in event["workers"])
        return _Said(WARN, f"ISOLATED, unproved: {names}" if names else "nobody is isolated any more")
    if kind == "replaced":
        return _Said(PLAIN, f"{event['before']}, convicted before, is not here: {name} is in its place")
    if kind == "halt":
        return _Said(BAD, f"HALT: {event['reason']}")
    if kind not in _SIMPLE:
        return None
    grade, text, goes_on = _SIMPLE[kind]
    return _Said(grade, text.format(name), goes_on)


_ALARM = {
    "fences": "outside the fences",
    "sums": "whose deviations have added up",
    "later alarms": "inside the fences, to which alarms behind them are traced back",
}
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
_SIMPLE = {
    "start": (PLAIN, "watching begins", False),
    "cleared": (GOOD, "CLEARED: {}, given the same micro-batches, did what its stage does", False),
    "release": (GOOD, "RELEASED: {}, on probation", False),
    "replay": (BAD, "PROVED: {} computed a step twice and made different things of the same", True),
    "misfit": (WARN, "MISFIT: {} told a mean that its messages cannot have, which counted for nothing", True),
    "skipped": (WARN, "the optimizer did not step", True),
    "twins": (PLAIN, "twin step: columns get the same micro-batches", True),
    "end": (PLAIN, "the run ends", False),
}
