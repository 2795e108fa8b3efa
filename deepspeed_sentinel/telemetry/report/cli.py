"""``deepspeed-sentinel report``: what happened in a run, in the terminal, as JSON, or as a page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deepspeed_sentinel.telemetry.report.digest import digest
from deepspeed_sentinel.telemetry.report.heat import heat
from deepspeed_sentinel.telemetry.report.losses import find_loss, read_loss
from deepspeed_sentinel.telemetry.report.page import render
from deepspeed_sentinel.telemetry.report.reading import read_run
from deepspeed_sentinel.telemetry.report.table import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a report on ``parser``."""
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN", help='"output_dir" of a run, which has its events.jsonl')
    add("--html", type=Path, metavar="FILE", help="write one page there that needs nothing else; view it in a browser")
    add("--json", action="store_true", help="print all of it as JSON in place of a table")
    add("--run", metavar="ID", help="which run, where the folder has several (default: the last)")
    add("--loss", type=Path, metavar="FILE", help="CSV, JSON lines with step and loss, or trainer_state.json, "
        "which is found by itself near RUN")  # fmt: skip
    add("--samples-a-step", type=int, default=1, metavar="N", help="divide its steps: DeepSpeed's CSV counts samples")


def run(args: argparse.Namespace) -> int:
    """Report; returns the exit status: 0 done, 1 there is nothing to read or to write to, 2 bad options."""
    if args.samples_a_step < 1:
        print(f"report: --samples-a-step must be 1 or more, got {args.samples_a_step}", file=sys.stderr)
        return 2
    try:
        files = read_run(args.folder, args.run)
        document = digest(files)
        if args.html:
            loss_file = args.loss or find_loss(files.folder)
            loss = read_loss(loss_file, args.samples_a_step) if loss_file else {}
            scores = heat(files, document["run"]["first_step"], document["run"]["last_step"])
            args.html.parent.mkdir(parents=True, exist_ok=True)
            args.html.write_text(render(document, scores, loss), encoding="utf-8", errors="replace")
    except (OSError, ValueError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        show(document)
    if args.html:
        print(f"Written to {args.html}", file=sys.stderr)
    return 0
