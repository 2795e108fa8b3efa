"""Writes what a finished demo leaves: summary.json, both pictures, the events, and a table."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed_sentinel.demo.options import DemoOptions
from deepspeed_sentinel.demo.progress import DemoState
from deepspeed_sentinel.demo.summary import read_events, summarise, table_rows, worker_name
from deepspeed_sentinel.telemetry import plots
from deepspeed_sentinel.telemetry.evidence_plot import plot_evidence

_NUMBERS = {1: "One", 2: "Two", 3: "Three"}


def write(options: DemoOptions, state: DemoState) -> dict[str, Any]:
    """Write all files into the demo's folder, print the table, and return the summary."""
    out = Path(options.out)
    recorded = options.sentinel_folder("guarded") / "events.jsonl"
    events = read_events(recorded)
    shutil.copyfile(recorded, out / "events.jsonl")
    summary = summarise(options, state, events)
    (out / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draw(options, state, events, summary)
    show(options, summary)
    return summary


def draw(options: DemoOptions, state: DemoState, events: list[dict[str, Any]], summary: Mapping[str, Any]) -> None:
    """``loss.png`` and ``evidence.png``."""
    out, runs = Path(options.out), state.runs
    arguments = ", ".join(f"{key} {value}" for key, value in options.attack_arguments.items())
    count, names = len(options.attackers), "; ".join(map(worker_name, options.attackers))
    verb = "tampers" if count == 1 else "tamper"
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
        convicted_steps=[one["convicted_step"] for one in summary["attackers"] if one["convicted_step"] is not None],
        skipped_steps=summary["skipped"]["all_columns_out"],
        title=f"{_NUMBERS.get(count, str(count))} tampering worker{'s'[: count > 1]}, with and without Sentinel",
        subtitle=f"{count} of {options.workers} workers ({names}) {verb} with all {what} sent: {fault}",
    )
    plot_evidence(
        out / "evidence.png",
        events,
        title="What Sentinel saw of each worker",
        attackers=options.attackers,
        attack_start=options.start_step,
    )


def show(options: DemoOptions, summary: Mapping[str, Any]) -> None:
    """The summary as a table in the terminal, and where to read on."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="deepspeed-sentinel demo", show_header=False, title_style="bold")
    for what, value in table_rows(summary):
        table.add_row(what, value)
    console = Console()
    console.print(table)
    for line in (
        f"Written to {options.out}: summary.json, loss.png, evidence.png, events.jsonl",
        f"More about the guarded run: {report_command(options)}",
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def report_command(options: DemoOptions) -> str:
    """The line for a shell, in the folder that the demo was started in, that reports on the guarded run."""
    # The package's script need not be on the path, and what a venv's interpreter links to does not know the package.
    python, here = Path(sys.executable), Path.cwd()
    shown = python.relative_to(here) if python.is_relative_to(here) else python
    return shlex.join([str(shown), "-m", "deepspeed_sentinel", "report", str(options.sentinel_folder("guarded"))])
