"""The report in the terminal: the three sentences, what to do, and a table of workers; plain text where rich is not."""

from __future__ import annotations

import importlib.util
import shutil
import textwrap
import unicodedata
from typing import Any, NamedTuple

from deepspeed_sentinel.evidence.table import in_words
from deepspeed_sentinel.telemetry.report.words import found_of, in_steps, many, number, why_alarm

_COLOURS = {"convicted": "bold red", "proved": "bold red", "suspect": "yellow", "cleared": "cyan", "released": "cyan"}
_HEADS = ("state", "worker", "what was found")
_MOST = 40


class Line(NamedTuple):
    """One that stands above the table.

    Attributes:
        text: without its indentation.
        indent: blanks before it, and before what it is continued by.
        paste: it is for a shell, and must not be broken.
    """

    text: str
    indent: int = 0
    paste: bool = False

    def wrapped(self, width: int) -> list[str]:
        """As it stands in a terminal so wide: broken between words alone."""
        before = " " * self.indent
        if self.paste or not self.text:
            return [before + self.text]
        return textwrap.wrap(
            self.text,
            width,
            initial_indent=before,
            subsequent_indent=before,
            break_long_words=False,
            break_on_hyphens=False,
        )


def lines_of(document: dict[str, Any]) -> list[Line]:
    """What stands above the table. Texts of others have lost what a terminal would act on."""
    todo = document["todo"]
    lines = [*map(Line, document["sentences"]), Line(""), Line("What to do now:")]
    lines += [Line(one, 2) for one in todo["advice"] or ["nothing"]]
    for line in todo["lines"]:
        lines += [Line(f"{line['for']}:", 2), *(Line(one, 4, paste=True) for one in line["text"].splitlines())]
        lines += [Line(line["note"], 4)] if line["note"] else []
    if document["disputes"]:
        lines += [Line(""), Line("Disputes:")]
        for one in document["disputes"][:_MOST]:
            about = f", about {one['about']}" if one["about"] else ""
            pair = f"link {one['link']}, {one['direction']}: {one['sender']} and {one['receiver']}{about}"
            lines.append(Line(f"{pair}, {many(one['messages'], 'message')}, {in_steps(one['steps'])}", 2))
        lines += [Line(one, 2) for one in _rest(document["disputes"])]
    if document["notes"]:
        lines += [Line(""), Line("Notes:"), *(Line(note, 2) for note in document["notes"])]
    return [line._replace(text=printable(line.text)) for line in lines]


def rows_of(document: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(state, worker, what was found of it, one thing a line) of each worker."""
    rows = []
    for one in document["workers"][:_MOST]:
        found, convicted, worst = [], one["convicted"], one["worst"]
        if convicted:
            found.append(
                f"convicted {'before this run' if convicted['step'] is None else 'in step ' + str(convicted['step'])}"
            )
        found += [f"{label} {text}" for label, text in found_of(one)]
        if one["alarms"]:
            found.append(f"{many(one['alarms'], 'message')} in alarm, {in_steps(one['alarm_steps'])}")
        if worst is not None:
            measured = f"{in_words(worst['statistic'])} = {number(worst['value'])}"
            score = f"score {number(worst['score'])} (1 is on the fence)"
            found.append(f"worst in step {worst['step']}: {measured}, {score}{why_alarm(worst)}")
        rows.append((printable(one["state"]), printable(one["name"]), list(map(printable, found))))
    return rows


def _rest(every: list[Any]) -> list[str]:
    return [f"and {len(every) - _MOST} more: --html or --json has all"] if len(every) > _MOST else []


def show(document: dict[str, Any]) -> None:
    """Print it."""
    lines, rows = lines_of(document), rows_of(document)
    if importlib.util.find_spec("rich") is None:
        plain = [" | ".join((state, worker, "; ".join(found))) for state, worker, found in rows]
        shown = [one for line in lines for one in line.wrapped(shutil.get_terminal_size().columns)]
        print("\n".join([*shown, "", *([" | ".join(_HEADS), *plain] if rows else []), *_rest(document["workers"])]))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for line in lines:
        for one in line.wrapped(console.width):
            console.print(Text(one), soft_wrap=True)
    if rows:
        console.print()
        table = Table(
            title="Workers that something was found of", title_justify="left", title_style="bold", show_lines=True
        )
        table.add_column(_HEADS[0], no_wrap=True)
        widest = console.width // 3
        rows = [(state, _short(worker, widest), found) for state, worker, found in rows]
        longest = max(len(word) for _, worker, _ in rows for word in worker.split())
        table.add_column(_HEADS[1], overflow="fold", min_width=min(longest, widest), max_width=max(longest, widest))
        table.add_column(_HEADS[2], overflow="fold", min_width=widest)
        for state, worker, found in rows:
            table.add_row(Text(state, style=_COLOURS.get(state, "")), Text(worker), Text("\n".join(found)))
        console.print(table)
    for one in _rest(document["workers"]):
        console.print(one)


def _short(worker: str, most: int) -> str:
    """A worker's name whose long words, such as ``ip-10-0-1-23.eu-west-1.compute.internal,``, lose their domains."""
    words = []
    for word in worker.split(" "):
        at = word.rfind(".", 1, most - 2) if len(word) > most else -1
        words.append(word if at < 0 else f"{word[:at]}\N{HORIZONTAL ELLIPSIS}{word[len(word.rstrip('),')) :]}")
    return " ".join(words)


def printable(text: str) -> str:
    """Without control characters, and what turns the direction of writing: a host's name is anybody's text."""
    return "".join(one if unicodedata.category(one)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for one in text)
