"""The picture of the evidence against each worker, and of who served which column; see ``plots``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepspeed_sentinel.mesh import Mesh
from deepspeed_sentinel.telemetry.deals import Deal, deals
from deepspeed_sentinel.telemetry.plots import BLUE, GREY, RED, STEP_AND_FRACTION, note, pyplot, titles

_CELLS = "A cell is a worker in a step, its colour the score of its worst message: blue inside the fences, red outside"
_COUNTED = "Which columns are in the step"
_SERVED = "Who serves which column: in each table the replica of each stage, below it the columns"
_UNJUDGED, _TWINS, _HONEST, _LOST, _FOUND, _OUTSIDE = "#dddddd", "#8c8c8c", "#dbe7f7", "#b5b5b5", "#f2a33a", "#b2182b"
_SHOWN = 5  # deals that fit beside one another
_DOT: dict[str, Any] = {"s": 9, "color": "black", "linewidths": 0, "zorder": 3}
_STAR: dict[str, Any] = {"s": 150, "marker": "*", "color": "#ffd400", "edgecolors": "black", "zorder": 5}
_CROSS: dict[str, Any] = {"s": 26, "marker": "x", "color": "black", "linewidths": 1.6, "zorder": 4}
_DEALT: dict[str, Any] = {"s": 34, "marker": "v", "color": BLUE, "linewidths": 0, "clip_on": False}


def step_scores(events: Iterable[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(steps [T], scores [T, stages, replicas]) of the "step" events; a score of 1 lies on the fence.

    Raises:
        ValueError: there are none, since ``"events": "steps"`` was not set.
    """
    found = [event for event in events if event["kind"] == "step"]
    if not found:
        raise ValueError('no "step" events: set "events": "steps" in the sentinel block to record every score.')
    scores = [[[np.nan if one is None else one for one in row] for row in event["scores"]] for event in found]
    return np.array([event["step"] for event in found]), np.array(scores, dtype=float)


def lost_columns(events: Iterable[Mapping[str, Any]], dealt: Sequence[Deal], steps: np.ndarray) -> np.ndarray:
    """bool [T, C]: the columns that a convicted worker serves, from the step of its conviction on."""
    convicted = np.zeros((len(steps), *dealt[0].wiring.shape), bool)
    for event in events:
        if event["kind"] in ("conviction", "release", "replaced"):
            convicted[steps >= event["step"], event["stage"], event["replica"]] = event["kind"] == "conviction"
    deal_of_step = np.searchsorted([deal.step for deal in dealt[1:]], steps, side="right")
    wiring = np.stack([dealt[deal].wiring for deal in deal_of_step])
    return np.asarray(np.take_along_axis(convicted, wiring, axis=2).any(1))


def plot_evidence(
    path: Path,
    events: Sequence[Mapping[str, Any]],
    *,
    title: str,
    attackers: Sequence[tuple[int, int]] = (),
    attack_start: int | None = None,
) -> None:
    """What was seen of each worker, which columns that left in each step, and who served them, each with a legend.

    A heat map has a row for each worker, grouped by stage, and a column for each step; colour is the score: white on
    the fence, blue inside, red outside. A dot marks a worker that was blamed in that step: first in the chain outside
    the fences. A star marks a conviction. Below it is a row for each column of the pipeline: in the step, left out for
    what was found in it, or out with a convicted worker; with the steps that were skipped, and those in which columns
    were dealt anew. Below that is a table of each deal.

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
    steps, scores_TSR = step_scores(events)
    _, stages, replicas = scores_TSR.shape
    dealt = deals(events, Mesh(stages, replicas))
    standing = _standing(steps, events, dealt)
    keys = [_keys_of_workers(events, attackers), _keys_of_columns(events, standing), _keys_of_tables(attackers)]
    # Panels from top to bottom, and the room below each for its legend and the next one's title; in inches.
    heights = [0.34 * stages * replicas, 0.27 * replicas, *([0.32 * stages] if dealt[1:] else [])]
    rooms = [1.1 + 0.19 * ((len(each) + 1) // 2) for each in keys[: len(heights) - 1]]
    whole = sum(heights) + sum(rooms)
    figure = plt.figure(figsize=(11, whole), dpi=150)
    tops = whole - np.cumsum([0, *heights[:-1]]) - np.cumsum([0, *rooms])

    def panel(index: int, left: float = 0, width: float = 1) -> Any:
        place = (0.16 + 0.75 * left, (tops[index] - heights[index]) / whole, 0.75 * width, heights[index] / whole)
        return figure.add_axes(place)

    axes, counted = panel(0), panel(1)
    image = _heat_map(axes, steps, scores_TSR, events)
    bar = figure.colorbar(image, cax=panel(0, 1.015, 0.022), ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["0.1", "1 = fence", "10"], fontsize=10)
    bar.set_label("score", fontsize=10, labelpad=6)
    _workers(axes, stages, replicas, attackers)
    _legend(axes, keys[0], heights[0])
    titles(axes, title, _CELLS, lift=26)
    _counted(counted, steps, events, standing)
    _legend(counted, keys[1], heights[1])
    titles(counted, "", _COUNTED, lift=16)
    for each in (axes, counted):
        each.set_xlabel("training step", fontsize=11)
        if attack_start is not None:
            each.axvline(attack_start - 0.5, color=RED, linestyle="--", linewidth=1.8)
    if attack_start is not None:
        note(axes, "attack starts", (attack_start - 0.5, 1), (0, 4), STEP_AND_FRACTION, ha="center", color=RED)
    if dealt[1:]:
        width = 1 / (1.25 * _SHOWN - 0.25)
        places = [panel(2, 1.25 * width * place, width) for place in range(_SHOWN)]
        _tables(places, dealt, int(steps[-1]), attackers)
        titles(places[0], "", _SERVED, lift=26)
        _legend(places[0], keys[2], heights[2])
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _heat_map(axes: Any, steps: np.ndarray, scores_TSR: np.ndarray, events: Sequence[Mapping[str, Any]]) -> Any:
    _, stages, replicas = scores_TSR.shape
    # Zero means nothing judged: shown as missing, not as very innocent.
    scores = np.where(scores_TSR > 0, scores_TSR, np.nan).reshape(len(steps), -1).T
    axes.set_facecolor(_UNJUDGED)
    image = axes.imshow(
        np.log10(scores),
        aspect="auto",
        cmap="RdBu_r",
        vmin=-1.5,
        vmax=1.5,
        extent=(steps[0] - 0.5, steps[-1] + 0.5, stages * replicas - 0.5, -0.5),
        interpolation="nearest",
    )
    for kind, style in (("alarm", _DOT), ("conviction", _STAR)):
        found = _of_kind(events, kind)
        rows = [event["stage"] * replicas + event["replica"] for event in found]
        axes.scatter([event["step"] for event in found], rows, **style)
    for event in _of_kind(events, "twins"):
        axes.axvspan(event["step"] - 0.5, event["step"] + 0.5, color=_TWINS, linewidth=0, zorder=-1)
    warm = [event["step"] for event in _of_kind(events, "step") if event.get("warming_up")]
    if warm:
        middle = (steps[0] + max(warm)) / 2
        note(axes, "warm-up", (middle, 1), (0, 4), STEP_AND_FRACTION, ha="center", color=GREY)
        axes.axvline(max(warm) + 0.5, color=GREY, linestyle=":", linewidth=1.5)
    return image


def _workers(axes: Any, stages: int, replicas: int, attackers: Sequence[tuple[int, int]]) -> None:
    from matplotlib.patches import Rectangle

    for stage in range(1, stages):
        axes.axhline(stage * replicas - 0.5, color="white", linewidth=3)
    axes.set_yticks(range(stages * replicas))
    names = [
        ("ATTACKER  " if (stage, replica) in attackers else "") + f"stage {stage}, replica {replica}"
        for stage in range(stages)
        for replica in range(replicas)
    ]
    labels = axes.set_yticklabels(names, fontsize=10)
    left, right = axes.get_xlim()
    for stage, replica in attackers:
        row = stage * replicas + replica
        labels[row].set(color=RED, fontweight="bold")
        outline: dict[str, Any] = {"fill": False, "edgecolor": RED, "linewidth": 2.2, "zorder": 2}
        axes.add_patch(Rectangle((left, row - 0.5), right - left, 1, **outline))


def _standing(steps: np.ndarray, events: Sequence[Mapping[str, Any]], dealt: Sequence[Deal]) -> np.ndarray:
    """int [T, C]: a column is in the step, left out of it, or out with a convicted worker, as an index of a colour."""
    lost = lost_columns(events, dealt, steps)
    out = np.zeros_like(lost)
    for index, event in enumerate(_of_kind(events, "step")):
        out[index, event["excluded"]] = True
    return np.where(out, np.where(lost, 2, 1), 0)


def _counted(axes: Any, steps: np.ndarray, events: Sequence[Mapping[str, Any]], standing: np.ndarray) -> None:
    """A row for each column: in the step, or why not; steps that were skipped; where columns are dealt anew."""
    from matplotlib.colors import ListedColormap

    columns = standing.shape[1]
    axes.imshow(
        standing.T,
        aspect="auto",
        cmap=ListedColormap([_HONEST, _FOUND, _LOST]),
        vmin=0,
        vmax=2,
        extent=(steps[0] - 0.5, steps[-1] + 0.5, columns - 0.5, -0.5),
        interpolation="nearest",
    )
    for row in range(1, columns):
        axes.axhline(row - 0.5, color="white", linewidth=3)
    axes.set_yticks(range(columns), [f"column {column}" for column in range(columns)], fontsize=10)
    for event in _of_kind(events, "skipped"):
        axes.scatter([event["step"]] * columns, range(columns), **_CROSS)
    # From the left edge of a step: it goes by the new columns already.
    begun = sorted({event["step"] - 0.5 for event in _of_kind(events, "wiring")})
    axes.scatter(begun, [1 + 0.2 / columns] * len(begun), transform=axes.get_xaxis_transform(), **_DEALT)


def _tables(places: Sequence[Any], dealt: Sequence[Deal], last_step: int, attackers: Sequence[tuple[int, int]]) -> None:
    """One table a deal, the first and the last ones: a row a stage, in it the replica that serves each column."""
    ends = [*(deal.step - 1 for deal in dealt[1:]), last_step]
    before = [dealt[0], *dealt[:-1]]
    ranges = list(zip(dealt, before, ends, strict=True))
    shown = [*ranges[:1], *ranges[max(1, len(dealt) - len(places) + 1) :]]
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    for axes, (deal, earlier, end) in zip(places, shown, strict=False):
        stages, columns = deal.wiring.shape
        for stage, column in np.ndindex(stages, columns):
            replica = int(deal.wiring[stage, column])
            bad = (stage, replica) in attackers
            colour = RED if bad else _LOST if deal.lost[column] else _HONEST
            corners = ([column, column + 1], stage, stage + 1)
            axes.fill_between(*corners, color=colour, edgecolor="white", linewidth=2)
            style: dict[str, Any] = {"fontsize": 10, "fontweight": "bold" if bad else "normal"}
            if replica != earlier.wiring[stage, column]:
                style["bbox"] = {"boxstyle": "circle,pad=0.18", "facecolor": "none", "edgecolor": "black"}
            ink = "white" if bad else "black"
            axes.text(column + 0.5, stage + 0.5, str(replica), ha="center", va="center", color=ink, **style)
        axes.set(xlim=(0, columns), ylim=(stages, 0))
        axes.set_xticks(np.arange(columns) + 0.5, [f"{c}\n{'out' if deal.lost[c] else ''}" for c in range(columns)])
        names = [f"stage {stage}" for stage in range(stages)] if axes is places[0] else []
        axes.set_yticks(np.arange(stages) + 0.5, names)
        axes.tick_params(length=0, labelsize=9.5)
        axes.spines[:].set_visible(False)
        several = f"steps {deal.step} to {end}"
        axes.set_title(several if end > deal.step else f"step {deal.step}", fontsize=10.5)


def _keys_of_workers(events: Sequence[Mapping[str, Any]], attackers: Sequence[tuple[int, int]]) -> list[Any]:
    keys: list[Any] = []
    if _of_kind(events, "alarm"):
        keys.append(_point(_DOT, "blamed: the first on the messages' way outside the fences"))
        keys.append(_patch("red without a dot: comes after it, not held against this worker", color=_OUTSIDE))
    if _of_kind(events, "conviction"):
        keys.append(_point(_STAR, "convicted in this step"))
    if attackers:
        keys.append(_patch("tampers (Sentinel is not told)", facecolor="none", edgecolor=RED, linewidth=2))
    if _of_kind(events, "twins"):
        keys.append(_patch("twin step: all get the same data; compared bit by bit, no score", color=_TWINS))
        keys.append(_patch("red in a twin step: comes after a difference, not compared", color="#d6604d"))
    return [*keys, _patch("no score: warm-up, or nothing to judge", color=_UNJUDGED)]


def _keys_of_columns(events: Sequence[Mapping[str, Any]], standing: np.ndarray) -> list[Any]:
    keys = [_patch("in the step", color=_HONEST)]
    if (standing == 1).any():
        keys.append(_patch("left out of this step: something was found in it", color=_FOUND))
    if (standing == 2).any():
        keys.append(_patch("out: a convicted worker serves it", color=_LOST))
    if _of_kind(events, "skipped"):
        keys.append(_point(_CROSS, "step skipped: no weight changed"))
    if _of_kind(events, "wiring"):
        keys.append(_point(_DEALT, "columns dealt anew, as the tables below say"))
    return keys


def _keys_of_tables(attackers: Sequence[tuple[int, int]]) -> list[Any]:
    keys = [_patch("column in the step, unless something is found", color=_HONEST)]
    keys.append(_patch("out: a convicted worker serves it, by the last of these steps", color=_LOST))
    if attackers:
        keys.append(_patch("tampers", color=RED))
    ring = {"s": 90, "marker": "o", "facecolors": "none", "edgecolors": "black"}
    return [*keys, _point(ring, "served another column before")]


def _legend(axes: Any, keys: Sequence[Any], height: float) -> None:
    """In two columns below an ``axes`` that is ``height`` inches high."""
    below = (-0.02, -0.46 / height)
    axes.legend(handles=keys, loc="upper left", bbox_to_anchor=below, ncols=2, fontsize=9.5, frameon=False,
        columnspacing=1.4, handletextpad=0.5, borderaxespad=0)  # fmt: skip


def _patch(label: str, **style: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(label=label, **style)


def _point(style: Mapping[str, Any], label: str) -> Any:
    """What ``scatter`` draws with ``style``, for a legend."""
    from matplotlib.lines import Line2D

    face = style.get("facecolors", style.get("color"))
    return Line2D(
        [],
        [],
        linestyle="",
        label=label,
        marker=style.get("marker", "o"),
        markersize=float(np.sqrt(style["s"])),
        markerfacecolor=face,
        markeredgecolor=style.get("edgecolors", style.get("color")),
        markeredgewidth=style.get("linewidths", 1.0),
    )


def _of_kind(events: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event["kind"] == kind]
