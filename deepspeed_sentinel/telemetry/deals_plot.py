"""Draws who served which column: a table for each deal, for ``evidence_plot``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepspeed_sentinel.telemetry.cells import Cells
from deepspeed_sentinel.telemetry.deals import Deal

COUNTS, OUT, CONVICTED = "#a9dcc8", "#8b8b8b", "black"
NUMBERS = "a number is the replica that serves; ringed: it has just come to this column; grey: out in most steps"
TABLES = 5  # deals that fit beside one another
_WHOLE = 8  # stages up to which a table has all of them


@dataclass(frozen=True)
class Table:
    """A deal, and what came of it.

    Attributes:
        first, last: its steps.
        wiring: int64 [S, C].
        moved: bool [S, C], who serves another column than in the deal before.
        out: bool [C], columns left out in most of these steps.
        none: the steps in which no column counted.
    """

    first: int
    last: int
    wiring: np.ndarray
    moved: np.ndarray
    out: np.ndarray
    none: tuple[int, ...]


def tables_of(dealt: Sequence[Deal], cells: Cells) -> list[Table]:
    """The first deal and the last ones, as many as fit."""
    ends = [*(deal.step - 1 for deal in dealt[1:]), cells.last]
    found = []
    for before, deal, end in zip([dealt[0], *dealt], dealt, ends, strict=False):
        begin = max(deal.step, cells.first)
        steps = cells.out[begin - cells.first : max(0, end + 1 - cells.first)]
        none = tuple((begin + np.flatnonzero(steps.all(1))).tolist())
        out = np.asarray(2 * steps.sum(0) > len(steps))
        found.append(Table(deal.step, end, deal.wiring, deal.wiring != before.wiring, out, none))
    return [*found[:1], *found[max(1, len(found) - TABLES + 1) :]]


def stages_shown(dealt: Sequence[Deal], convicted: Collection[tuple[int, int]]) -> list[int]:
    """All stages; of many those in which somebody was moved or convicted: in the others replica c serves column c."""
    stages = len(dealt[0].wiring)
    changed = {int(stage) for deal in dealt for stage in np.flatnonzero((deal.wiring != dealt[0].wiring).any(1))}
    changed |= {stage for stage, _ in convicted}
    return sorted(changed) if stages > _WHOLE and changed else list(range(stages))


def in_words(dealt: Sequence[Deal], shown: Sequence[int]) -> str:
    """What the tables show."""
    times = len(dealt) - 1
    steps = ", ".join(str(deal.step) for deal in dealt[1:])
    told = f"for step {steps}" if times == 1 else f"for steps {steps}" if times < TABLES else f"{times} times"
    left = f"; the first and the last {TABLES - 1} deals" if times >= TABLES else ""
    some = "; stages in which nobody moved are left away" if len(shown) < len(dealt[0].wiring) else ""
    return f"Who served which column: dealt anew {told}{left}{some}"


def draw_table(
    axes: Any, table: Table, shown: Sequence[int], convicted: Collection[tuple[int, int]], *, names: bool
) -> None:
    """A row for each stage of ``shown``, in it the replica that serves each column; ``names`` of the rows beside it."""
    columns = table.wiring.shape[1]
    inches = axes.get_position().width * axes.figure.get_figwidth() / columns
    size = float(np.clip(45 * inches, 4.5, 10))
    for row, stage in enumerate(shown):
        for column in range(columns):
            replica = int(table.wiring[stage, column])
            bad = (stage, replica) in convicted
            colour = CONVICTED if bad else OUT if table.out[column] else COUNTS
            axes.fill_between([column, column + 1], row, row + 1, color=colour, edgecolor="white", linewidth=1.5)
            ink = "white" if bad else "black"
            style: dict[str, Any] = {"fontsize": size, "fontweight": "bold" if bad else "normal", "color": ink}
            if table.moved[stage, column]:
                style["bbox"] = {"boxstyle": "circle,pad=0.16", "facecolor": "none", "edgecolor": ink}
            axes.text(column + 0.5, row + 0.5, str(replica), ha="center", va="center", **style)
    axes.set(xlim=(0, columns), ylim=(len(shown), 0))
    labels = [f"{column}\n{'out' * bool(table.out[column])}" for column in range(columns)]
    axes.set_xticks(np.arange(columns) + 0.5, labels)
    axes.set_yticks(np.arange(len(shown)) + 0.5, [f"stage {stage}" for stage in shown] if names else [])
    axes.tick_params(length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=size)
    if table.none and not table.out.all():
        seldom = f"step {table.none[0]}" if len(table.none) == 1 else f"{len(table.none)} steps"
        below = {"xytext": (0, -2.6 * size - 3), "textcoords": "offset points", "ha": "center", "va": "top"}
        axes.annotate(f"all out in {seldom}", (0.5, 0), xycoords="axes fraction", fontsize=9, **below)
    if names:
        axes.text(-0.1, len(shown) + 0.12, "column ", ha="right", va="top", fontsize=9)
    axes.spines[:].set_visible(False)
    several = f"steps {table.first} to {table.last}"
    axes.set_title(several if table.last > table.first else f"step {table.first}", fontsize=10)
