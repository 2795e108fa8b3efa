"""The report as one HTML page: styles, script and data inside, nothing loaded from anywhere."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from deepspeed_sentinel.evidence.table import in_words
from deepspeed_sentinel.telemetry.report.digest import utc
from deepspeed_sentinel.telemetry.report.words import (
    conviction_in_words,
    found_of,
    in_steps,
    many,
    number,
    spans,
    why_alarm,
)

_TEMPLATE, _STYLE, _SCRIPT = "report.html.j2", "report.css", "report.js"
_GRAVE = ("convicted", "proved", "suspect", "released")  # these get a card, others a row
_MOST_DEALS = 5  # beside the first
_MOST_ROWS = 400  # of a table: a page is for people, events.jsonl has all
_MOST_DEVICES = 50


def render(document: dict[str, Any], heat: dict[str, Any], loss: dict[str, list[list[float]]]) -> str:
    """The page.

    Args:
        document: see ``digest.digest``.
        heat: see ``heat.heat``.
        loss: of each run, [step, loss] pairs, see ``losses.read_loss``; empty for none.

    Raises:
        ImportError: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            'the HTML report needs jinja2: pip install ".[report]" in a clone, or pip install jinja2; '
            "without --html it is a table"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"utc": utc, "number": number, "steps": spans, "duration": duration, "many": many}
    environment.filters |= {"in_words": in_words, "in_steps": in_steps, "found": found_of, "why": conviction_in_words}
    environment.filters["why_alarm"] = why_alarm
    return environment.get_template(_TEMPLATE).render(
        **document,
        # "settings" and "loss" of a file may hold anything; tojson writes <, > and & so that no script ends early.
        data={"heat": heat, "loss": list(loss.items()), "names": _names(document, heat), "states": _states(document)},
        grid=_grid(document),
        grave=[one for one in document["workers"] if one["state"] in _GRAVE],
        light=[one for one in document["workers"] if one["state"] not in _GRAVE],
        shown_deals=document["deals"][:1] + document["deals"][1:][-_MOST_DEALS:],
        most_rows=_MOST_ROWS,
        most_devices=_MOST_DEVICES,
        style=_read(_STYLE),
        script=_read(_SCRIPT),
        effective=json.dumps(document["settings"], indent=1),
    )


def duration(seconds: float) -> str:
    """In the unit that people would use."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _read(name: str) -> str:
    return (files("deepspeed_sentinel.telemetry.report") / name).read_text(encoding="utf-8")


def _grid(document: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """[S][R] of what the plan of the mesh shows of each worker."""
    run = document["run"]
    states = {(one["stage"], one["replica"]): one for one in document["workers"]}
    blank = {"state": "clean", "name": "nothing found"}
    replicas = range(run["replicas"])
    return [[states.get((stage, replica), blank) for replica in replicas] for stage in range(run["stages"])]


def _names(document: dict[str, Any], heat: dict[str, Any]) -> dict[int, str]:
    return {one["stage"] * heat["replicas"] + one["replica"]: one["name"] for one in document["workers"]}


def _states(document: dict[str, Any]) -> list[list[Any]]:
    replicas = document["run"]["replicas"]
    return [[one["stage"] * replicas + one["replica"], one["state"]] for one in document["workers"]]
