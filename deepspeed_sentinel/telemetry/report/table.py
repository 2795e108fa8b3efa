"""The report in the terminal: the three sentences, what to do, and a table of workers; plain text where rich is not."""

from __future__ import annotations

import importlib.util
import unicodedata
from typing import Any

from deepspeed_sentinel.telemetry.report.page import number, spans

_COLOURS = {"convicted": "bold red", "proved": "bold red", "suspect": "yellow", "cleared": "cyan", "released": "cyan"}
_MOST = 40


def lines_of(document: dict[str, Any]) -> list[str]:
    """What stands above and below the table. Texts of others have lost what a terminal would act on."""
    todo = document["todo"]
    lines = [*document["sentences"], "", "What to do now:", *(f"  {one}" for one in todo["advice"] or ["nothing"])]
    for line in todo["lines"]:
        lines += [f"  {line['for']}:", *(f"    {one}" for one in line["text"].splitlines())]
    if document["disputes"]:
        lines += ["", "Disputes:"]
        for one in document["disputes"][:_MOST]:
            about = f", about {one['about']}" if one["about"] else ""
            lines.append(f"  link {one['link']}, {one['direction']}: {one['sender']} and {one['receiver']}{about}, "
                         f"{one['messages']} messages, steps {spans(one['steps'])}")  # fmt: skip
    if document["notes"]:
        lines += ["", "Notes:", *(f"  {note}" for note in document["notes"])]
    return list(map(printable, lines))


def rows_of(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """(state, worker, alarms, worst alarm, proof) of each worker."""
    rows = []
    for one in document["workers"][:_MOST]:
        worst = one["worst"]
        alarm = "" if worst is None else (
            f"step {worst['step']}: {worst['statistic']} {number(worst['value'])}, compared "
            f"{number(worst['residual'])}, fence {number(worst['low'])} to {number(worst['high'])}, "
            f"score {number(worst['score'])}"
        )  # fmt: skip
        proof = "; ".join(f"step {proof['step']}: {proof['of']}" for proof in one["proofs"][:3])
        if one["convicted"]:
            step = one["convicted"]["step"]
            proof = f"convicted {'before this run' if step is None else f'in step {step}'}. {proof}"
        alarms = f"{one['alarms']} in steps {spans(one['alarm_steps'])}" if one["alarms"] else ""
        rows.append(tuple(map(printable, (one["state"], one["name"], alarms, alarm, proof))))
    return rows


def show(document: dict[str, Any]) -> None:
    """Print it."""
    lines, rows = lines_of(document), rows_of(document)
    heads = ("state", "worker", "alarms", "worst alarm", "proof")
    if importlib.util.find_spec("rich") is None:
        print("\n".join([*lines, "", *(" | ".join(row) for row in (heads, *rows) if rows)]))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    if rows:
        table = Table(title="Workers that something was found of", title_justify="left", title_style="bold")
        for head in heads:
            table.add_column(head, overflow="fold")
        for row in rows:
            table.add_row(Text(row[0], style=_COLOURS.get(row[0], "")), *map(Text, row[1:]))
        console.print(table)
    if len(document["workers"]) > _MOST:
        console.print(f"and {len(document['workers']) - _MOST} more: --html or --json has all")


def printable(text: str) -> str:
    """Without control characters, and what turns the direction of writing: a host's name is anybody's text."""
    return "".join(one if unicodedata.category(one)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for one in text)
