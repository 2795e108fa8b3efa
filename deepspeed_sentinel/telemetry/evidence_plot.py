"""The picture of the evidence against each worker, and of who served which column; see ``plots``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepspeed_sentinel.mesh import Mesh
from deepspeed_sentinel.telemetry.deals import Deal, deals
from deepspeed_sentinel.telemetry.plots import GREY, RED, STEP_AND_FRACTION, note, pyplot, titles

_CASCADE = "Red without a dot: an honest worker passing on what it was sent. Sentinel blames the first in the chain."
_SERVED = "Who serves which column (numbers: replicas; red: attackers; grey: out, since a convicted worker serves it)"
_UNJUDGED, _TWINS, _HONEST, _LOST = "#dddddd", "#8c8c8c", "#e4ecf7", "#eeeeee"
_SHOWN = 5  # deals that fit beside one another


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


def plot_evidence(
    path: Path,
    events: Sequence[Mapping[str, Any]],
    *,
    title: str,
    attackers: Sequence[tuple[int, int]] = (),
    attack_start: int | None = None,
) -> None:
    """Heat map: a row for each worker, grouped by stage; a column for each step; colour: the score.

    White is on the fence, blue inside, red outside. A dot marks a worker that was blamed in that step:
    first in the chain outside the fences. A star marks a conviction. Where columns are dealt anew, a number says which
    column a worker serves from that step on, and below there is a table of each deal.

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
    heights = [0.36 * stages * replicas, *([0.5 + 0.3 * stages] if dealt[1:] else [])]
    figure = plt.figure(figsize=(11, 1.9 + 1.5 * len(heights[1:]) + sum(heights)), dpi=150)
    space = 2.0 / (sum(heights) / len(heights))
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights, hspace=space)
    axes = figure.add_subplot(grid[0])
    _heat_map(axes, steps, scores_TSR, events)
    _workers(axes, stages, replicas, attackers)
    if attack_start is not None:
        note(axes, "attack starts", (attack_start - 0.5, 1), (0, 4), STEP_AND_FRACTION, ha="center", color=RED)
        axes.axvline(attack_start - 0.5, color=RED, linestyle="--", linewidth=1.8)
    titles(axes, title, _CASCADE, lift=26)
    if dealt[1:]:
        _tables(figure, grid[1], dealt, int(steps[-1]), attackers)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _heat_map(axes: Any, steps: np.ndarray, scores_TSR: np.ndarray, events: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

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
    blamed, convicted = _marks(events, "alarm", replicas), _marks(events, "conviction", replicas)
    keys = [axes.scatter(*blamed, s=9, color="black", linewidths=0, label="blamed in this step", zorder=3)]
    if convicted[0]:
        star = {"s": 150, "marker": "*", "color": "#ffd400", "edgecolors": "black", "zorder": 5}
        keys.append(axes.scatter(*convicted, label="convicted", **star))
    twins = [event["step"] for event in events if event["kind"] == "twins"]
    for step in twins:
        axes.axvspan(step - 0.5, step + 0.5, color=_TWINS, linewidth=0, zorder=-1)
    if twins:
        text = "twin step: columns get the same data and are compared bit by bit, not scored"
        keys.append(Patch(color=_TWINS, label=text))
    moved = [(event["step"], move) for event in events if event["kind"] == "wiring" for move in event["moved"]]
    for step, (stage, replica, _, column) in moved:
        box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": GREY, "linewidth": 0.6}
        style = {"ha": "center", "va": "center", "fontsize": 8, "fontweight": "bold", "bbox": box, "zorder": 4}
        note(axes, str(column), (step, stage * replicas + replica), (0, 0), **style)
    if moved:
        text = "serves this column from here on"
        keys.append(Line2D([], [], linestyle="", marker="$2$", color="black", markersize=7, label=text))
    warm = [event["step"] for event in events if event["kind"] == "step" and event.get("warming_up")]
    if warm:
        middle = (steps[0] + max(warm)) / 2
        note(axes, "warm-up", (middle, 1), (0, 4), STEP_AND_FRACTION, ha="center", color=GREY)
        axes.axvline(max(warm) + 0.5, color=GREY, linestyle=":", linewidth=1.5)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["0.1", "1 = fence", "10"], fontsize=10)
    bar.set_label("score of the worst message a worker sent", fontsize=10, labelpad=8)
    axes.set_xlabel("training step", fontsize=12)
    below = {"loc": "upper left", "bbox_to_anchor": (-0.01, -0.09 - 0.35 / (stages * replicas))}
    axes.legend(handles=keys, ncols=2, fontsize=10, frameon=False, columnspacing=1.4, handletextpad=0.4, **below)


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


def _tables(
    figure: Any, place: Any, dealt: Sequence[Deal], last_step: int, attackers: Sequence[tuple[int, int]]
) -> None:
    """One table a deal, the first and the last ones: a row a stage, in it the replica that serves each column."""
    ends = [*(deal.step - 1 for deal in dealt[1:]), last_step]
    ranges = list(zip(dealt, ends, strict=True))
    shown = [*ranges[:1], *ranges[max(1, len(dealt) - _SHOWN + 1) :]]
    tables = place.subgridspec(1, _SHOWN, wspace=0.25)
    for index, (deal, end) in enumerate(shown):
        axes = figure.add_subplot(tables[index])
        stages, columns = deal.wiring.shape
        for stage in range(stages):
            for column in range(columns):
                replica = int(deal.wiring[stage, column])
                bad = (stage, replica) in attackers
                colour = RED if bad else _LOST if deal.lost[column] else _HONEST
                axes.fill_between([column, column + 1], stage, stage + 1, color=colour, edgecolor="white", linewidth=2)
                style = {"fontsize": 10, "fontweight": "bold" if bad else "normal"}
                ink = "white" if bad else "#aaaaaa" if deal.lost[column] else "black"
                axes.text(column + 0.5, stage + 0.5, str(replica), ha="center", va="center", color=ink, **style)
        axes.set(xlim=(0, columns), ylim=(stages, 0))
        axes.set_xticks(np.arange(columns) + 0.5, [f"{c}\n{'out' if deal.lost[c] else ''}" for c in range(columns)])
        axes.set_yticks(np.arange(stages) + 0.5, [f"stage {stage}" for stage in range(stages)] if index == 0 else [])
        axes.tick_params(length=0, labelsize=9.5)
        axes.spines[:].set_visible(False)
        several = f"steps {deal.step} to {end}"
        axes.set_title(several if end > deal.step else f"step {deal.step}", fontsize=10.5)
        if index == 0:
            axes.set_xlabel("column", fontsize=10.5)
            titles(axes, "", _SERVED, lift=26)


def _marks(events: Iterable[Mapping[str, Any]], kind: str, replicas: int) -> tuple[list[int], list[int]]:
    found = [event for event in events if event["kind"] == kind]
    return [event["step"] for event in found], [event["stage"] * replicas + event["replica"] for event in found]
