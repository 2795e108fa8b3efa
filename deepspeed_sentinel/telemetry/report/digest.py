"""What a run came to: the document that the page, the table and ``--json`` show."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from deepspeed_sentinel.telemetry.deals import deals
from deepspeed_sentinel.telemetry.report.happened import timeline
from deepspeed_sentinel.telemetry.report.reading import RunFiles, injecting
from deepspeed_sentinel.telemetry.report.starting import lines_to_start
from deepspeed_sentinel.telemetry.report.suspects import excluded_now, name_of, suspects

_GAP = 5  # steps without an alarm after which one before is no part of what followed
_TROUBLE = ("proofs", "unequal_weights", "disputes", "alarmed_steps")


def digest(run: RunFiles) -> dict[str, Any]:
    """All of it as plain data; steps are the engine's, from 0, times seconds since 1970.

    "state" is the gravest of: convicted, proved, halted, suspect, alarmed, clean. "sentences" are three. "cost" is what
    the columns left out took: as a share of all column-steps, in whole steps' worth of data, and in seconds at this
    run's pace. A line of "todo" is left out, and a note says so, where a host has a name that no shell should be given.
    """
    shown = suspects(run)
    facts = _facts(run)
    cost = _cost(run, facts)
    halted = next((event["reason"] for event in reversed(run.events) if event["kind"] == "halt"), None)
    states = {one["state"] for one in shown}
    less = states & {"alarmed", "disputed", "released", "noted"}
    is_so = {"convicted": "convicted" in states, "proved": "proved" in states, "halted": halted is not None}
    is_so |= {"suspect": "suspect" in states, "alarmed": bool(less), "clean": True}
    state = next(name for name, so in is_so.items() if so)
    start = next((event for event in run.events if event["kind"] == "start"), {})
    notes = list(run.notes)
    if not facts["every_step"]:
        notes.append(
            "scores of clean steps were not recorded: the heat map has only steps in which something was found. "
            '"events": "steps" in the sentinel block records all'
        )
    document = {
        "run": {"folder": str(run.folder), "run_id": run.run_id, "stages": run.mesh.stages,
                "replicas": run.mesh.replicas, "injecting": start.get("injecting", False), "halted": halted, **facts},
        "state": state,
        "workers": shown,
        "timeline": timeline(run),
        "disputes": _disputes(run),
        "deals": _deals(run),
        "cost": cost,
        "todo": _todo(run, shown, notes),
        "devices": _devices(run),
        "settings": start.get("config", {}),
        "earlier": run.earlier,
        "notes": notes,
    }  # fmt: skip
    return {"sentences": _sentences(document), **document}


def _facts(run: RunFiles) -> dict[str, Any]:
    steps = [event["step"] for event in run.events if event["kind"] not in ("start", "end", "device")]
    told: dict[str, Any] = next((event["counts"] for event in reversed(run.events) if event["kind"] == "end"), {})
    every = {event["step"] for event in run.events if event["kind"] == "step"}
    end = next((event["step"] - 1 for event in reversed(run.events) if event["kind"] == "end"), 0)
    first = next((event["step"] for event in run.events if event["kind"] == "start"), min(steps, default=0))
    last = max([*steps, end, first])
    times = [(event["step"], event["time"]) for event in run.events if event["time"] is not None]
    clock = [(step, when) for step, when in times if first <= step <= last]
    pace = (clock[-1][1] - clock[0][1]) / (clock[-1][0] - clock[0][0]) if clock and clock[-1][0] > clock[0][0] else None
    return {
        "first_step": first,
        "last_step": last,
        "steps": told.get("steps") or len(every) or last - first + 1,
        "judged_messages": told.get("judged_messages"),
        "begun": times[0][1] if times else None,
        "ended": times[-1][1] if times else None,
        "finished": bool(told),
        "seconds_a_step": pace,
        "every_step": bool(every),
    }


def _cost(run: RunFiles, facts: dict[str, Any]) -> dict[str, Any]:
    lost = Counter[int]()
    for event in run.events:
        if event["kind"] == "excluded":
            lost.update(set(event["columns"]))
    total, of = sum(lost.values()), facts["steps"] * run.mesh.replicas
    worth = total / run.mesh.replicas
    return {
        "column_steps": total,
        "of": of,
        "share": total / of if of else 0.0,
        "steps_worth": worth,
        "seconds": None if facts["seconds_a_step"] is None else worth * facts["seconds_a_step"],
        "by_column": [lost[column] for column in range(run.mesh.replicas)],
        "skipped_steps": sum(event["kind"] == "skipped" for event in run.events),
        "twin_steps": sum(event["kind"] == "twins" for event in run.events),
    }


def _disputes(run: RunFiles) -> list[dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for event in run.events:
        if event["kind"] == "dispute":
            told = tuple(
                event[name] for name in ("link", "direction", "sender", "receiver", "about", "audit", "at_fault")
            )
            link, direction, sender, receiver, about, audit, at_fault = told
            names = [None if one is None else name_of(run, one) for one in (sender, receiver, about, at_fault)]
            one = found.setdefault(
                told,
                {"link": link, "direction": direction, **dict(zip(("sender", "receiver", "about", "at_fault"), names,
                 strict=True)), "audit": audit, "messages": 0, "steps": [], "columns": []},
            )  # fmt: skip
            one["messages"] += len(event["micro_batches"])
            one["steps"] += [event["step"]] if event["step"] not in one["steps"][-1:] else []
            one["columns"] = sorted({*one["columns"], event["column"]})
    return list(found.values())


def _deals(run: RunFiles) -> list[dict[str, Any]]:
    found = deals(run.events, run.mesh)
    ends = [*(deal.step - 1 for deal in found[1:]), None]
    return [
        {"step": deal.step, "last": end, "wiring": deal.wiring.tolist(), "lost": deal.lost.tolist()}
        for deal, end in zip(found, ends, strict=True)
    ]


def _todo(run: RunFiles, shown: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """What to do: "advice", sentences, and "lines" to paste, each with what it is for and a "note" beside it."""
    unheeded = _unheeded(run)
    advice = [
        *_out_of_service([one for one in shown if (one["stage"], one["replica"]) not in unheeded]),
        *_looked_into([one for one in shown if (one["stage"], one["replica"]) in unheeded]),
        *_watched(shown),
    ]
    if any(event["kind"] == "dispute" for event in run.events) and not advice:
        advice.append("Check both ends of the disputed links and what lies between them")
    grave = {(one["stage"], one["replica"]) for one in shown if one["state"] == "convicted"}
    if any(event["kind"] == "device" and not grave.intersection(event["workers"]) for event in run.events):
        advice.append("Look into the devices listed below: their record over runs is worse than their peers'")
    for left in _earlier(run):
        where = f"{left.get('host')}, slot {left.get('slot')}"
        advice.append(f"Keep {where} out of service: convicted in an earlier run. {left.get('why')}")
    if advice and injecting(run.events):
        advice.insert(0, "Nothing: faults were injected on purpose. In any other run it would be:")
    return {"advice": advice, **lines_to_start(run.exclude, notes, any(one["state"] == "convicted" for one in shown))}


def _earlier(run: RunFiles) -> list[dict[str, Any]]:
    """Entries of ``exclude.json`` whose machines this run did without, or was to."""
    workers = run.exclude.get("workers")
    return [
        one
        for one in (workers if isinstance(workers, list) else ())
        if isinstance(one, dict) and one.get("earlier") and one.get("in_lines", True)
    ]


def _unheeded(run: RunFiles) -> set[tuple[int, int]]:
    """Whom statistics alone have convicted while nothing was kept out of the weights."""
    found, action = set(), None
    for event in run.events:
        if event["kind"] == "start":
            action = event["config"].get("action")
        elif event["kind"] == "settings":
            action = event["action"]
        elif event["kind"] == "conviction" and event["proved"] is False and action == "observe":
            found.add((event["stage"], event["replica"]))
    for one in excluded_now(run):
        if one.get("in_lines") is False and one.get("proved") is False:
            found.add((one["stage"], one["replica"]))
        elif one.get("proved") is True:
            found.discard((one["stage"], one["replica"]))
    return found


def _out_of_service(shown: list[dict[str, Any]]) -> Iterator[str]:
    """One sentence a host, and one for each worker that told none."""
    by_host: dict[str, list[dict[str, Any]]] = {}
    for one in shown:
        if one["state"] == "convicted":
            by_host.setdefault(one["host"] or one["name"], []).append(one)
    for host, convicts in by_host.items():
        slots = sorted(one["local_rank"] for one in convicts if isinstance(one["local_rank"], int))
        where = f"{host}, slot{'s'[: len(slots) > 1]} {', '.join(map(str, slots))}," if slots else host
        parts = ", ".join(one["gpu"] for one in convicts if one["gpu"]) or "processor and memory"
        names = f": {convicts[0]['name']}" if len(convicts) == 1 else ""
        yield f"Take {where} out of service and test {parts}{names}"


def _looked_into(shown: list[dict[str, Any]]) -> Iterator[str]:
    for one in shown:
        if one["state"] == "convicted":
            yield (
                f"Look into {one['name']}: convicted by statistics alone while nothing was kept out of the weights. An "
                "honest worker beside a fault looks the same"
            )


def _watched(shown: list[dict[str, Any]]) -> Iterator[str]:
    for one in shown:
        if one["state"] == "proved":
            never = ", as first and last stage never are" if one["trusted"] else ""
            yield f"Test {one['name']}: proved to compute something else, and not convicted{never}"
        elif one["state"] == "suspect" and one["trusted"]:
            yield f"Look at the data and the hardware of {one['name']}: suspected, and its stage is never convicted"
    waiting = [one for one in shown if one["state"] == "suspect" and not one["trusted"]]
    if waiting:
        who = waiting[0]["name"] + (f" and {len(waiting) - 1} more" if waiting[1:] else "")
        yield f"No reason to act yet: {who}, suspected and not proved. The next twin steps try them"


def _devices(run: RunFiles) -> list[dict[str, Any]]:
    """Those with trouble, the gravest first."""
    rows = []
    for key, one in run.devices.items():
        counts = {name: one["total"].get(name, 0) for name in (*_TROUBLE, "steps", "alarms")}
        if any(counts[name] for name in _TROUBLE):
            places = [place for place in one["places"] if isinstance(place, dict)]
            where = places[-1] if places else {}
            rows.append({"device": key, "host": str(where.get("host", "")), "slot": where.get("slot"), **counts,
                         "trouble": one["total"].get("trouble", 0)})  # fmt: skip
    return sorted(rows, key=lambda row: [-row[name] for name in _TROUBLE])


def _sentences(document: dict[str, Any]) -> list[str]:
    run, cost, workers = document["run"], document["cost"], document["workers"]
    judged = "" if run["judged_messages"] is None else f" and judged {run['judged_messages']:,} messages"
    begun, ended = utc(run["begun"]), utc(run["ended"])
    when = f" from {begun} to {ended[11:] if ended[:10] == begun[:10] else ended}" if begun else ""
    drill = ", with faults injected on purpose" if run["injecting"] else ""
    first = (
        f"Sentinel watched {run['stages']} stages x {run['replicas']} replicas in steps {run['first_step']} to "
        f"{run['last_step']}{when}{judged}{drill}."
    )
    by = {state: [one for one in workers if one["state"] == state] for state in ("convicted", "proved", "suspect")}
    if by["convicted"]:
        one, further = by["convicted"][0], len(by["convicted"]) - 1
        more = f"; and {further - 3} more" if further > 3 else ""
        others = "".join(f"; {other['name']} was {_conviction(other)}" for other in by["convicted"][1:4])
        second = f"{one['name']} was {_since(one)}{_conviction(one)}{others}{more}."
    elif by["proved"]:
        more = f", and {len(by['proved']) - 1} more" if by["proved"][1:] else ""
        second = f"Nobody was convicted, but {by['proved'][0]['name']} was proved to compute something else{more}."
    elif by["suspect"]:
        others = f" and {len(by['suspect']) - 1} more are" if by["suspect"][1:] else " is"
        second = f"Nobody was convicted; {by['suspect'][0]['name']}{others} suspected, without proof."
    elif workers:
        alarms = sum(one["alarms"] for one in workers)
        second = (
            f"Nobody was convicted and nobody is a suspect; {len(workers)} workers were noted, with {alarms} alarms."
        )
    else:
        second = "Nothing was found: no alarm, no dispute, no conviction."
    share = f"{cost['column_steps']:,} of {cost['of']:,} column-steps ({100 * cost['share']:.1f} %)"
    out = f"{share} were left out of the weights, the data of {cost['steps_worth']:.1f} steps"
    lost = document["deals"][-1]["lost"] if document["deals"] else []
    if run["halted"]:
        third = f"{out}, and training was stopped: {run['halted']}"
    elif not run["finished"]:
        third = f"{out}; no end is told: the run is going on, or was killed."
    else:
        on = (
            f"training went on with {lost.count(False)} of {run['replicas']} columns"
            if any(lost)
            else "all columns counted at the end"
        )
        third = f"{out}, and {on}." if cost["column_steps"] else f"No column was left out, and {on}."
    return [first, second[0].upper() + second[1:], third]


def _conviction(one: dict[str, Any]) -> str:
    """How and when a worker was convicted."""
    step = one["convicted"]["step"]
    how = {True: "convicted by proof", False: "convicted by statistics, not by proof,", None: "convicted"}
    return f"{how[one['convicted']['proved']]} {'before this run' if step is None else f'in step {step}'}"


def _since(one: dict[str, Any]) -> str:
    """From when on a convicted worker was in alarm: an alarm long before may have been a false one."""
    steps, convicted = one["alarm_steps"], one["convicted"]["step"]
    if not steps:
        return ""
    before = [step for step in steps if convicted is None or step <= convicted]
    onset = len(before) - 1
    while onset > 0 and before[onset] - before[onset - 1] <= _GAP:
        onset -= 1
    first = before[onset] if before else steps[0]
    earlier = f" (and in {onset} earlier {'step' if onset == 1 else 'steps'})" if onset > 0 else ""
    return f"in alarm from step {first} on{earlier} and was "


def utc(seconds: float | None) -> str:
    """For people."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
