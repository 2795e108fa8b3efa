"""From the recorded lines and events of a demo to ``summary.json`` and the table in the terminal."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed_sentinel.demo.options import DemoOptions
from deepspeed_sentinel.demo.progress import DemoState
from deepspeed_sentinel.mesh import Mesh
from deepspeed_sentinel.telemetry.deals import deals

Place = tuple[int, int]  # (stage, replica)
_NAMING = ("alarm", "proof", "contradicted", "conviction")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run, in order.

    Raises:
        ValueError: the file does not exist.
    """
    if not path.exists():
        raise ValueError(f"No events at {path}: the guarded run did not get far enough to write any.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spread(seconds: Sequence[float]) -> dict[str, Any] | None:
    """How long steps took: how many, median and quartiles, in seconds; None where none was measured."""
    if not seconds:
        return None
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if seconds[1:] else [seconds[0]] * 3
    return {"steps": len(seconds), "quartile_1": low, "median": middle, "quartile_3": high}


def overhead(plain_seconds: Sequence[float], guarded_seconds: Sequence[float]) -> float | None:
    """Median guarded time of a step over median plain time; None where either was not measured."""
    if not plain_seconds or not guarded_seconds:
        return None
    return statistics.median(guarded_seconds) / statistics.median(plain_seconds)


def first_step(events: Iterable[Mapping[str, Any]], kinds: Collection[str], worker: Place, start: int) -> int | None:
    """Step of the first event of ``kinds`` about ``worker`` from step ``start`` on; None if there was none."""
    steps = (
        event["step"]
        for event in events
        if event["kind"] in kinds and (event["stage"], event["replica"]) == worker and event["step"] >= start
    )
    return min(steps, default=None)


def false_alarms(events: Iterable[Mapping[str, Any]], attackers: Collection[Place], start: int) -> int:
    """Messages blamed on a worker that did not alter them: on another one, or before the attack starts."""
    return sum(
        len(event["micro_batches"])
        for event in events
        if event["kind"] == "alarm" and ((event["stage"], event["replica"]) not in attackers or event["step"] < start)
    )


def skipped(events: Sequence[Mapping[str, Any]], columns: int) -> dict[str, list[int]]:
    """Steps in which no weight changed: those with every column left out, of "columns", and "other" ones."""
    out = {event["step"] for event in events if event["kind"] == "excluded" and len(event["columns"]) == columns}
    steps = [event["step"] for event in events if event["kind"] == "skipped"]
    return {
        "all_columns_out": [step for step in steps if step in out],
        "other": [step for step in steps if step not in out],
    }


def convictions(events: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Workers that were convicted, each once, in the order in which it happened."""
    return list(dict.fromkeys((event["stage"], event["replica"]) for event in events if event["kind"] == "conviction"))


def summarise(options: DemoOptions, state: DemoState, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of ``summary.json``. Losses are held-out nats a token, None where not finite.

    "attackers": for each of them the steps in which it was first named and in which it was convicted, None if it was
    not. "columns": in which steps they were dealt anew, who serves which in the end ([stage][column], replicas), and
    how many go on, having no convicted worker. "skipped": steps in which no weight changed, by why. "overhead" is the
    ratio of the medians in "step_seconds", of steps with and without Sentinel in alternation, without attack.
    """
    convicted = convictions(events)
    early = {
        (event["stage"], event["replica"])
        for event in events
        if event["kind"] == "conviction" and event["step"] < options.start_step
    }
    guarded, clean = state.runs["guarded"], state.runs["clean"]
    dealt = deals(events, Mesh(options.stages, options.replicas))
    return {
        "mesh": {"stages": options.stages, "replicas": options.replicas},
        "steps": options.steps,
        "attack": options.fault(),
        "attackers": [
            {
                "stage": worker[0],
                "replica": worker[1],
                "found_step": first_step(events, _NAMING, worker, options.start_step),
                "convicted_step": first_step(events, ("conviction",), worker, options.start_step),
            }
            for worker in options.attackers
        ],
        "clean": {"final_loss": clean.final_loss, "steps_per_s": clean.steps_per_s},
        "attacked": {"final_loss": state.runs["attacked"].final_loss},
        "guarded": {
            "final_loss": guarded.final_loss,
            "steps_per_s": guarded.steps_per_s,
            "convicted": [list(worker) for worker in convicted],
            "false_convictions": sum(worker not in options.attackers or worker in early for worker in convicted),
            "false_alarms": false_alarms(events, options.attackers, options.start_step),
            "judged_messages": guarded.counts["judged_messages"],
            "skipped_steps": guarded.counts["skipped_steps"],
        },
        "columns": {
            "dealt_steps": [deal.step for deal in dealt[1:]],
            "wiring": dealt[-1].wiring.tolist(),
            "going_on": int((~dealt[-1].lost).sum()),
        },
        "skipped": skipped(events, options.replicas),
        "overhead": overhead(state.plain_seconds, state.guarded_seconds),
        "step_seconds": {"plain": spread(state.plain_seconds), "guarded": spread(state.guarded_seconds)},
        "machine": {"device": options.device, "processes": options.workers, "cpu_cores": os.cpu_count()},
    }


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) rows for people, from the summary."""
    guarded, attack, columns = summary["guarded"], summary["attack"], summary["columns"]
    dealt = ", ".join(map(str, columns["dealt_steps"]))
    return [
        ("held-out loss, clean", _number(summary["clean"]["final_loss"])),
        ("held-out loss, attacked, no guard", _number(summary["attacked"]["final_loss"])),
        ("held-out loss, attacked, guarded", _number(guarded["final_loss"])),
        ("attack", f"from step {attack['start_step']}: {attack['attack']}, {attack['direction']}"),
        *((f"  {worker_name((one['stage'], one['replica']))}",
            f"{_step('found', one['found_step'])}, {_step('convicted', one['convicted_step'])}")
            for one in summary["attackers"]),
        ("columns dealt anew", f"for steps {dealt}" if dealt else "never"),
        ("columns that go on", f"{columns['going_on']} of {summary['mesh']['replicas']}"),
        ("false convictions", str(guarded["false_convictions"])),
        ("false alarms", f"{guarded['false_alarms']} of {guarded['judged_messages']} judged messages"),
        ("skipped steps", _skipped_steps(summary)),
        ("time of a step with Sentinel", _overhead(summary)),
    ]  # fmt: skip


def worker_name(worker: Place) -> str:
    """For people."""
    return f"stage {worker[0]}, replica {worker[1]}"


def _step(what: str, step: int | None) -> str:
    return f"never {what}" if step is None else f"{what} in step {step}"


def _skipped_steps(summary: Mapping[str, Any]) -> str:
    every, other = (", ".join(map(str, summary["skipped"][why])) for why in ("all_columns_out", "other"))
    reasons = [f"in {every} every column was left out"] if every else []
    reasons += [f"in {other} for another reason, see events.jsonl"] if other else []
    count = sum(map(len, summary["skipped"].values()))
    if not count:
        return f"none of {summary['steps']}: a column was left in each"
    return f"{count} of {summary['steps']}, and no weight changed: {'; '.join(reasons)}"


def _overhead(summary: Mapping[str, Any]) -> str:
    """The ratio, how much the steps differ among themselves, and what it does not tell."""
    if summary["overhead"] is None:
        return "not measured"
    plain, guarded = summary["step_seconds"]["plain"], summary["step_seconds"]["guarded"]
    machine = summary["machine"]
    where = f"{machine['processes']} processes"
    where += f" that share {machine['cpu_cores']} CPU cores" if machine["device"] == "cpu" else ", a GPU each"
    return (
        f"{100 * (summary['overhead'] - 1):+.0f} % over plain DeepSpeed, no attack: medians of "
        f"{guarded['steps']} and {plain['steps']} steps in alternation\n"
        f"with: {_seconds(guarded)}\nwithout: {_seconds(plain)}\n"
        f"This is a tiny model on {where}, no measure of real ones. What was measured of larger models: "
        "README.md, Cost, and docs/operations.md, Size"
    )


def _seconds(steps: Mapping[str, Any]) -> str:
    low, middle, high = steps["quartile_1"], steps["median"], steps["quartile_3"]
    return f"{middle:.2f} s, quartiles {low:.2f} to {high:.2f}"


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"
