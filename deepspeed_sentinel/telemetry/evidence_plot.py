"""The picture of the evidence: what each worker sent, which columns counted, and who served them; see ``plots``.

``cells`` says what there is to be seen; here each colour, hatch and mark means one thing in all panels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepspeed_sentinel.mesh import Mesh
from deepspeed_sentinel.telemetry.cells import (
    AT_ODDS,
    BEHIND,
    NAMED,
    Cells,
    Convicted,
    Event,
    cells_of,
    convictions_of,
    drawn_together,
    runs_of,
)
from deepspeed_sentinel.telemetry.deals import Deal, deals
from deepspeed_sentinel.telemetry.deals_plot import (
    CONVICTED,
    COUNTS,
    NUMBERS,
    OUT,
    TABLES,
    draw_table,
    in_words,
    stages_shown,
    tables_of,
)
from deepspeed_sentinel.telemetry.plots import GREY, STEP_AND_FRACTION, note, pyplot

# Other ones for whoever does not see red, green or blue too.
_INSIDE, _NAMED, _BEHIND, _AT_ODDS = ("#e3eef8", "#9cc3e6"), "#c8460a", "#f5cf7f", "#7b2d7f"
_TWINS = "#5b8db8"
_CROSS: dict[str, Any] = {"s": 30, "marker": "x", "color": "white", "linewidths": 2, "zorder": 4}
_DEALT: dict[str, Any] = {"s": 40, "marker": "v", "color": "black", "linewidths": 0, "clip_on": False}
_POINTS = 400  # steps that can be told apart in the width of a panel
_NAMED_ROWS = 40  # workers up to which each row has its name
_LEFT, _WIDE = 1.6, 7.6  # of a panel, in inches


def plot_evidence(
    path: Path,
    events: Sequence[Event],
    *,
    title: str,
    attackers: Sequence[tuple[int, int]] = (),
    attack_start: int | None = None,
) -> None:
    """What each worker sent, which columns counted in each step, and who served them, with one legend.

    The first panel has a row for each worker, grouped by stage, and a column for each step; a cell says whether its
    messages lay inside the fences, outside them by its own doing, or outside because of somebody before it. A black
    frame begins where a worker is convicted, and words beside the row say so. The second has a row for each column of
    the pipeline: it counted, or was left out. The third, if columns were dealt anew, has a table for each deal.

    Args:
        path: of the PNG.
        events: of one run, in order.
        title: above it.
        attackers: (stage, replica) of workers known to be bad.
        attack_start: the step from which they are.

    Raises:
        ValueError: ``events`` holds no "step" events.
    """
    plt = pyplot()
    cells = cells_of(events)
    _, stages, replicas = cells.workers.shape
    convicted = convictions_of(events, cells.last)
    dealt = deals(events, Mesh(stages, replicas))
    ever = {(one.stage, one.replica) for one in convicted}
    tables, shown = tables_of(dealt, cells), stages_shown(dealt, ever)
    keys = _keys(cells, convicted, dealt)
    heights = [
        float(np.clip(7 / (stages * replicas), 0.045, 0.3)) * stages * replicas,
        float(np.clip(3 / replicas, 0.08, 0.27)) * replicas,
        0.27 * len(shown),
    ]
    # Above each panel there is room for its title, below it for its steps.
    tops = np.cumsum([1.2 + 0.2 * -(-len(keys) // 2), heights[0] + 0.95, heights[1] + 1.3])
    whole = float(tops[2] + heights[2] + 0.3 if dealt[1:] else tops[1] + heights[1] + 0.6)
    figure = plt.figure(figsize=(11.4, whole), dpi=150)

    def panel(index: int, left: float = 0, wide: float = _WIDE) -> Any:
        place = ((_LEFT + left) / 11.4, 1 - (tops[index] + heights[index]) / whole, wide / 11.4, heights[index] / whole)
        return figure.add_axes(place)

    figure.text(0.02, 1 - 0.3 / whole, title, fontsize=16, fontweight="bold")
    figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(0.015, 1 - 0.5 / whole), ncols=2, fontsize=9.5,
        frameon=False, columnspacing=1.6, handletextpad=0.6, borderaxespad=0)  # fmt: skip
    axes, counted = panel(0), panel(1)
    _workers(axes, cells, convicted, attackers)
    _headline(axes, "Score of each worker's worst message: above 1 is outside the fences, an alarm")
    _columns(counted, cells, dealt)
    last = int(np.count_nonzero(~cells.out[-1]))
    _headline(counted, f"Which columns counted: {last} of {replicas} in the last step")
    for each in (axes, counted):
        each.set_xlabel("training step", fontsize=10, labelpad=1)
        if attack_start is not None:
            each.axvline(attack_start - 0.5, color="black", linestyle="--", linewidth=1.5)
    if attack_start is not None:
        bold = ", by the workers in bold" if attackers and stages * replicas <= _NAMED_ROWS else ""
        note(axes, f"tampering starts{bold}", (attack_start - 0.5, 1), (0, 4), STEP_AND_FRACTION, ha="center")
    if dealt[1:]:
        wide = _WIDE / (1.2 * TABLES - 0.2)
        for at, table in enumerate(tables):
            draw_table(panel(2, 1.2 * wide * at, wide), table, shown, ever, names=at == 0)
        _headline(figure.axes[2], in_words(dealt, shown), lift=42)
        note(figure.axes[2], NUMBERS, (0, 1), (0, 25), "axes fraction", color=GREY)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _headline(axes: Any, text: str, lift: int = 20) -> None:
    note(axes, text, (0, 1), (0, lift), "axes fraction", fontsize=12.5, fontweight="bold")


def _image(axes: Any, cells: Cells, values: np.ndarray, colours: Any) -> None:
    """``values`` [T, rows] of the steps, in the colours of a colour map and its norm."""
    together, each = drawn_together(values, _POINTS)
    right = cells.first + each * len(together) - 0.5
    axes.imshow(together.T, aspect="auto", interpolation="nearest", **colours,
        extent=(cells.first - 0.5, right, values.shape[1] - 0.5, -0.5))  # fmt: skip
    axes.set_xlim(cells.first - 0.5, cells.last + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(length=2)


def _workers(axes: Any, cells: Cells, convicted: Sequence[Convicted], attackers: Sequence[tuple[int, int]]) -> None:
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
    from matplotlib.patches import Rectangle

    steps, stages, replicas = cells.workers.shape
    inside = LinearSegmentedColormap.from_list("inside", _INSIDE)(np.linspace(0, 1, 8))
    # On the fence is inside it.
    bounds = [*np.linspace(0, 1, 9)[:-1], 1.5, (BEHIND + AT_ODDS) / 2, (AT_ODDS + NAMED) / 2, NAMED + 1]
    norm = BoundaryNorm(bounds, len(bounds) - 1)
    colours = {"cmap": ListedColormap([*inside, _BEHIND, _AT_ODDS, _NAMED]), "norm": norm}
    _image(axes, cells, cells.workers.reshape(steps, -1), colours)
    for first, last in runs_of(cells.twins):
        axes.axvspan(cells.first + first - 0.5, cells.first + last + 0.5, facecolor="white", edgecolor=_TWINS,
            hatch="////", linewidth=0, zorder=-1)  # fmt: skip
    if _tells_warm_up(cells):
        first, last = runs_of(cells.warming_up & ~cells.twins)[0]
        style = {"ha": "center", "va": "center", "fontsize": 11, "color": GREY, "backgroundcolor": "white"}
        place = (cells.first + (first + last) / 2, 0.5)
        axes.text(*place, "warm-up:\nnothing is judged", transform=axes.get_xaxis_transform(), **style)
    for stage in range(1, stages):
        axes.axhline(stage * replicas - 0.5, color=GREY, linewidth=0.8)
    thick = float(np.clip(12 * _row(axes, stages * replicas), 0.7, 2.4))
    for one in convicted:
        corner = (max(one.first, cells.first) - 0.5, one.stage * replicas + one.replica - 0.5)
        frame: dict[str, Any] = {"edgecolor": CONVICTED, "linewidth": thick, "zorder": 3, "clip_on": False}
        axes.add_patch(Rectangle(corner, one.last - corner[0] + 0.5, 1, fill=False, **frame))
    _names(axes, stages, replicas, attackers)
    _words(axes, stages, replicas, convicted, attackers)


def _tells_warm_up(cells: Cells) -> bool:
    """Whether there is room for words in it."""
    runs = runs_of(cells.warming_up & ~cells.twins)
    return bool(runs) and runs[0][1] - runs[0][0] >= 0.19 * len(cells.workers)


def _row(axes: Any, rows: int) -> float:
    """The height of a row, in inches."""
    return float(axes.get_position().height * axes.figure.get_figheight() / rows)


def _names(axes: Any, stages: int, replicas: int, attackers: Sequence[tuple[int, int]]) -> None:
    """Of each row, or where they would stand in one another, of each stage."""
    if stages * replicas > _NAMED_ROWS:
        axes.set_yticks((np.arange(stages) + 0.5) * replicas - 0.5, [f"stage {stage}" for stage in range(stages)])
        axes.tick_params(axis="y", length=0, labelsize=9)
        return
    names = [f"stage {stage}, replica {replica}" for stage in range(stages) for replica in range(replicas)]
    labels = axes.set_yticks(range(stages * replicas), names, fontsize=9.5) and axes.get_yticklabels()
    for stage, replica in attackers:
        labels[stage * replicas + replica].set_fontweight("bold")


def _words(
    axes: Any, stages: int, replicas: int, convicted: Sequence[Convicted], attackers: Sequence[tuple[int, int]]
) -> None:
    """Beside the rows: who is convicted and when, and which worker that is known to tamper is not."""
    said: dict[tuple[int, int], str] = dict.fromkeys(attackers, "tampers, never convicted")
    for one in convicted:
        said[one.stage, one.replica] = f"convicted in step {one.first}"
    row = _row(axes, stages * replicas)
    places = sorted(said)
    room = int(stages * replicas * row / 0.19)
    apart, place = max(1.0, 0.19 / row), -np.inf
    for worker in places[:room]:
        here = worker[0] * replicas + worker[1]
        place = max(here, place + apart)
        name = f"stage {worker[0]}, replica {worker[1]}: " if stages * replicas > _NAMED_ROWS else ""
        axes.annotate(name + said[worker], (1, here), xycoords=axes.get_yaxis_transform(), xytext=(1.02, place),
            textcoords=axes.get_yaxis_transform(), va="center", fontsize=9.5, fontweight="bold", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    if places[room:]:
        note(axes, f"and {len(places) - room} more", (1.02, 0), (0, -14), "axes fraction", fontsize=9.5)


def _columns(axes: Any, cells: Cells, dealt: Sequence[Deal]) -> None:
    """A row for each column: it counted in a step or was left out, and beside it what holds at the end."""
    from matplotlib.colors import ListedColormap

    columns = cells.out.shape[1]
    _image(axes, cells, cells.out.astype(float), {"cmap": ListedColormap([COUNTS, OUT]), "vmin": 0, "vmax": 1})
    for row in range(1, columns):
        axes.axhline(row - 0.5, color="white", linewidth=2)
    size = float(np.clip(30 * 3 / columns, 4, 9.5))
    axes.set_yticks(range(columns), [f"column {column}" for column in range(columns)], fontsize=size)
    for column in range(columns):
        runs = runs_of(cells.out[:, column])
        gone = cells.out[-1, column]
        text = f"left out since step {cells.first + runs[-1][0]}" if gone else "goes on"
        style = {"va": "center", "fontsize": size, "fontweight": "normal" if gone else "bold"}
        axes.text(1.02, column, text, transform=axes.get_yaxis_transform(), **style)
    skipped = cells.first + np.flatnonzero(cells.skipped)
    axes.scatter(np.repeat(skipped, columns), np.tile(np.arange(columns), len(skipped)), **_CROSS)
    # From the left edge of a step: it goes by the new columns already.
    begun = [deal.step - 0.5 for deal in dealt[1:] if cells.first <= deal.step <= cells.last]
    axes.scatter(begun, [1 + 0.2 / columns] * len(begun), transform=axes.get_xaxis_transform(), **_DEALT)


def _keys(cells: Cells, convicted: Sequence[Convicted], dealt: Sequence[Deal]) -> list[Any]:
    """What the colours and marks mean, of those that there are."""
    what = cells.workers
    keys = [_patch("inside the fences; the darker, the nearer to them", color=_INSIDE[1])]
    for value, colour, text in (
        (NAMED, _NAMED, "ALARM: outside the fences, or proved to differ"),
        (BEHIND, _BEHIND, "outside too, but behind such a worker: not held against it"),
        (AT_ODDS, _AT_ODDS, "contradicts another; not known yet which of them is wrong"),
    ):
        if (what == value).any():
            keys.append(_patch(text, color=colour))
    if cells.twins.any():
        text = "twin step: all get the same data; no score, bits are compared"
        keys.append(_patch(text, facecolor="white", edgecolor=_TWINS, hatch="/////", linewidth=0))
    unsaid = ~cells.twins & ~(cells.warming_up & _tells_warm_up(cells))
    if np.isnan(what[unsaid]).any():
        why = "warm-up, or nothing to judge" if (cells.warming_up & unsaid).any() else "nothing to judge"
        keys.append(_patch(f"no score: {why}", facecolor="white", edgecolor=GREY, linewidth=0.8))
    if convicted:
        text = "convicted: framed from then on" + ", black in all tables" * bool(dealt[1:])
        keys.append(_patch(text, facecolor="white", edgecolor=CONVICTED, linewidth=2.2))
    keys.append(_patch("column counts", color=COUNTS))
    if cells.out.any():
        keys.append(_patch("column left out of the step", color=OUT))
    if cells.skipped.any():
        keys.append(_point({**_CROSS, "color": "black"}, "step skipped: no weight changed"))
    if dealt[1:]:
        keys.append(_point(_DEALT, "columns are dealt anew"))
    return keys


def _patch(label: str, **style: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(label=label, **style)


def _point(style: Mapping[str, Any], label: str) -> Any:
    """What ``scatter`` draws with ``style``, for a legend."""
    from matplotlib.lines import Line2D

    face, edge = (style.get(name, style.get("color")) for name in ("facecolors", "edgecolors"))
    return Line2D([], [], linestyle="", label=label, marker=style["marker"], markersize=float(np.sqrt(style["s"])),
        markerfacecolor=face, markeredgecolor=edge, markeredgewidth=style.get("linewidths", 1.0))  # fmt: skip
