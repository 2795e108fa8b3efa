"""From the recorded lines and events of a demo to ``summary.json`` and the table in the terminal."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed_sentinel.demo.options import DemoOptions
from deepspeed_sentinel.demo.progress import DemoState


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run, in order.

    Raises:
        ValueError: the file does not exist.
    """
    if not path.exists():
        raise ValueError(f"No events at {path}: the guarded run did not get far enough to write any.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def overhead(plain_seconds: Sequence[float], guarded_seconds: Sequence[float]) -> float | None:
    """Median guarded time per step over median plain time per step; None where either was not measured."""
    if not plain_seconds or not guarded_seconds:
        return None
    return statistics.median(guarded_seconds) / statistics.median(plain_seconds)


def first_step(events: Iterable[Mapping[str, Any]], kind: str, worker: tuple[int, int], start: int) -> int | None:
    """Step of the first event of ``kind`` about ``worker`` from step ``start`` on; None if there was none."""
    steps = (
        event["step"]
        for event in events
        if event["kind"] == kind and (event["stage"], event["replica"]) == worker and event["step"] >= start
    )
    return min(steps, default=None)


def false_alarms(events: Iterable[Mapping[str, Any]], attacker: tuple[int, int], start: int) -> int:
    """Messages blamed on a worker that did not alter them: on another one, or before the attack starts."""
    return sum(
        len(event["micro_batches"])
        for event in events
        if event["kind"] == "alarm" and ((event["stage"], event["replica"]) != attacker or event["step"] < start)
    )


def convictions(events: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Workers that were convicted, each once, in the order in which it happened."""
    return list(dict.fromkeys((event["stage"], event["replica"]) for event in events if event["kind"] == "conviction"))


def summarise(options: DemoOptions, state: DemoState, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of ``summary.json``. Losses are held-out nats a token, None where not finite."""
    convicted = convictions(events)
    early = {
        (event["stage"], event["replica"])
        for event in events
        if event["kind"] == "conviction" and event["step"] < options.start_step
    }
    guarded, clean = state.runs["guarded"], state.runs["clean"]
    return {
        "mesh": {"stages": options.stages, "replicas": options.replicas},
        "steps": options.steps,
        "attack": options.injection(),
        "clean": {"final_loss": clean.final_loss, "steps_per_s": clean.steps_per_s},
        "attacked": {"final_loss": state.runs["attacked"].final_loss},
        "guarded": {
            "final_loss": guarded.final_loss,
            "steps_per_s": guarded.steps_per_s,
            "attack_start_step": options.start_step,
            "first_alarm_step": first_step(events, "alarm", options.attacker, options.start_step),
            "convicted": [list(worker) for worker in convicted],
            "false_convictions": sum(worker != options.attacker or worker in early for worker in convicted),
            "false_alarms": false_alarms(events, options.attacker, options.start_step),
            "judged_messages": guarded.counts["judged_messages"],
            "skipped_steps": guarded.counts["skipped_steps"],
        },
        "overhead": overhead(state.plain_seconds, state.guarded_seconds),
    }


def table_rows(summary: Mapping[str, Any], convicted_step: int | None) -> list[tuple[str, str]]:
    """(what, value) rows for people, from the summary."""
    guarded, attack = summary["guarded"], summary["attack"]
    fault = f"{attack['attack']}, {attack['direction']}"
    worker = f"stage {attack['stage']}, replica {attack['replica']}"
    alarm = guarded["first_alarm_step"]
    convicted = ", ".join(f"stage {stage}, replica {replica}" for stage, replica in guarded["convicted"]) or "nobody"
    if convicted_step is not None:
        convicted += f" (attacker at step {convicted_step})"
    return [
        ("held-out loss, clean", _number(summary["clean"]["final_loss"])),
        ("held-out loss, attacked, no guard", _number(summary["attacked"]["final_loss"])),
        ("held-out loss, attacked, guarded", _number(guarded["final_loss"])),
        ("attacker", f"{worker}, from step {guarded['attack_start_step']}: {fault}"),
        ("first alarm", "none" if alarm is None else
            f"step {alarm} ({alarm - guarded['attack_start_step']} steps after the attack began)"),
        ("convicted", convicted),
        ("false convictions", str(guarded["false_convictions"])),
        ("false alarms", f"{guarded['false_alarms']} of {guarded['judged_messages']} judged messages"),
        ("skipped steps", str(guarded["skipped_steps"])),
        ("overhead", "not measured" if summary["overhead"] is None else
            f"{100 * (summary['overhead'] - 1):+.1f} % time per step, no attack"),
    ]  # fmt: skip


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"
