"""Writes what a finished demo leaves: summary.json, both pictures, the events, and a table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed_sentinel.demo.options import DemoOptions
from deepspeed_sentinel.demo.progress import DemoState
from deepspeed_sentinel.demo.summary import first_step, read_events, summarise, table_rows
from deepspeed_sentinel.telemetry import plots


def write(options: DemoOptions, state: DemoState) -> dict[str, Any]:
    """Write all files into the demo's folder, print the table, and return the summary."""
    out = Path(options.out)
    recorded = options.sentinel_folder("guarded") / "events.jsonl"
    events = read_events(recorded)
    shutil.copyfile(recorded, out / "events.jsonl")
    summary = summarise(options, state, events)
    (out / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    convicted_step = first_step(events, "conviction", options.attacker, options.start_step)
    draw(options, state, events, convicted_step)
    show(summary, convicted_step, out)
    return summary


def draw(options: DemoOptions, state: DemoState, events: list[dict[str, Any]], convicted_step: int | None) -> None:
    """``loss.png`` and ``evidence.png``."""
    out, runs = Path(options.out), state.runs
    stage, replica = options.attacker
    arguments = ", ".join(f"{key} {value}" for key, value in options.attack_arguments.items())
    worker = f"1 of {options.workers} workers (stage {stage}, replica {replica})"
    fault = f"{options.attack} ({arguments})" if arguments else options.attack
    what = "activations" if options.direction == "forward" else "gradients"
    curves = [
        plots.Curve("attacked, no guard", runs["attacked"].losses, runs["attacked"].final_loss, plots.RED),
        plots.Curve("clean (plain DeepSpeed)", runs["clean"].losses, runs["clean"].final_loss, plots.GREEN),
        plots.Curve("attacked, guarded", runs["guarded"].losses, runs["guarded"].final_loss, plots.BLUE, dashed=True),
    ]
    plots.plot_losses(
        out / "loss.png",
        curves,
        attack_start=options.start_step,
        convicted_step=convicted_step,
        title="One tampering worker, with and without Sentinel",
        subtitle=f"{worker} tampers with the {what} it sends: {fault}",
    )
    plots.plot_evidence(
        out / "evidence.png",
        events,
        title="What Sentinel saw of each worker",
        attacker=options.attacker,
        attack_start=options.start_step,
    )


def show(summary: Mapping[str, Any], convicted_step: int | None, out: Path) -> None:
    """The summary as a table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="deepspeed-sentinel demo", show_header=False, title_style="bold")
    for what, value in table_rows(summary, convicted_step):
        table.add_row(what, value)
    console = Console()
    console.print(table)
    console.print(f"Written to {out}: summary.json, loss.png, evidence.png, events.jsonl", soft_wrap=True)
