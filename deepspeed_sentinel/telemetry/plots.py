"""Pictures of a watched run, drawn from plain data: loss curves, and the evidence against each worker.

Needs matplotlib: ``pip install "deepspeed-sentinel[report]"``. Nothing here knows DeepSpeed or torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GREEN, RED, BLUE, GREY = "#2a9d5c", "#d1402f", "#2563c9", "#555555"
_STEP_AND_FRACTION = ("data", "axes fraction")
_CASCADE = "Red without a dot: an honest worker passing on what it was sent. Sentinel blames the first in the chain."


@dataclass(frozen=True)
class Curve:
    """One run's training losses.

    Attributes:
        label: what the legend says.
        losses: one a step in nats a token; None or NaN where it was not finite.
        final_loss: held-out loss after the last step, or None.
        colour: any matplotlib colour.
        dashed: drawn dashed, to stay visible on top of a curve it follows.
    """

    label: str
    losses: Sequence[float | None]
    final_loss: float | None
    colour: str
    dashed: bool = False


def smooth(losses: Sequence[float | None], decay: float = 0.6) -> np.ndarray:
    """Bias-corrected exponential average; steps without a finite loss are NaN and change nothing."""
    result = np.full(len(losses), np.nan)
    mean, weight = 0.0, 0.0
    for step, loss in enumerate(losses):
        if loss is None or not np.isfinite(loss):
            continue
        mean, weight = decay * mean + (1 - decay) * loss, decay * weight + (1 - decay)
        result[step] = mean / weight
    return result


def plot_losses(
    path: Path,
    curves: Sequence[Curve],
    *,
    attack_start: int,
    convicted_step: int | None,
    title: str,
    subtitle: str = "",
) -> None:
    """Training loss over steps, raw (faint) and smoothed, with the attack's start and the conviction marked.

    The curves' ends are labelled with the held-out loss.

    Raises:
        ValueError: there is no curve.
    """
    if not curves:
        raise ValueError("plot_losses needs at least one curve, got none.")
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(10, 5.8), dpi=150)
    steps = max(len(curve.losses) for curve in curves)
    finite = [value for curve in curves for value in curve.losses if value is not None and np.isfinite(value)]
    # One spike of a broken run must not press the curves that matter into a line.
    top = float(np.quantile(finite, 0.995)) if finite else 1.0
    bottom = min(finite, default=0.0)
    for curve in curves:
        raw = np.array([np.nan if loss is None else loss for loss in curve.losses], dtype=float)
        axes.plot(raw, color=curve.colour, alpha=0.22, linewidth=1)
        axes.plot(
            smooth(curve.losses),
            color=curve.colour,
            linewidth=2.6,
            linestyle=(0, (3, 2)) if curve.dashed else "-",
            label=curve.label,
        )
    margin = 0.06 * (top - bottom)
    axes.set_ylim(bottom - margin, top + 4 * margin)
    axes.set_xlim(0, steps * 1.01)
    axes.axvspan(attack_start - 0.5, steps * 1.01, color=RED, alpha=0.05, linewidth=0)
    _event_line(axes, attack_start, "attack starts", RED, left=True)
    if convicted_step is not None:
        _event_line(axes, convicted_step, "attacker convicted", BLUE, left=False)
    _end_labels(axes, curves, steps)
    axes.set_xlabel("training step", fontsize=12)
    axes.set_ylabel("training loss (nats per token)", fontsize=12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # Above the axes: there it covers no data, whatever the curves do.
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, fontsize=11, frameon=False)
    _titles(axes, title, subtitle, lift=38)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


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
    attacker: tuple[int, int] | None = None,
    attack_start: int | None = None,
) -> None:
    """Heat map: a row for each worker, grouped by stage; a column for each step; colour: the score.

    White is on the fence, blue inside, red outside. A dot marks a worker that was blamed in that step:
    first in the chain outside the fences. A star marks a conviction. Where columns are dealt anew, a number says which
    column a worker serves from that step on.

    Raises:
        ValueError: ``events`` holds no "step" events.
    """
    plt = _pyplot()
    from matplotlib.patches import Rectangle

    steps, scores_TSR = step_scores(events)
    _, stages, replicas = scores_TSR.shape
    # Zero means nothing judged (warm-up): shown as missing, not as very innocent.
    scores = np.where(scores_TSR > 0, scores_TSR, np.nan).reshape(len(steps), -1).T
    figure, axes = plt.subplots(figsize=(11, 1.9 + 0.36 * stages * replicas), dpi=150)
    axes.set_facecolor("#dddddd")
    extent = (steps[0] - 0.5, steps[-1] + 0.5, stages * replicas - 0.5, -0.5)
    image = axes.imshow(
        np.log10(scores),
        aspect="auto",
        cmap="RdBu_r",
        vmin=-1.5,
        vmax=1.5,
        extent=extent,
        interpolation="nearest",
    )
    blamed = _marks(events, "alarm", replicas)
    axes.scatter(*blamed, s=9, color="black", linewidths=0, label="blamed in this step", zorder=3)
    convicted = _marks(events, "conviction", replicas)
    if convicted[0]:
        axes.scatter(*convicted, s=190, marker="*", color="#ffd400", edgecolors="black", label="convicted", zorder=4)
    for event in events:
        for stage, replica, _, column in event["moved"] if event["kind"] == "wiring" else ():
            place = (event["step"] - 0.5, stage * replicas + replica)
            _note(axes, str(column), place, (1, 0), va="center", fontsize=8, fontweight="bold")
    for stage in range(1, stages):
        axes.axhline(stage * replicas - 0.5, color="white", linewidth=3)
    axes.set_yticks(range(stages * replicas))
    names = [f"stage {s}, replica {r}" for s in range(stages) for r in range(replicas)]
    if attacker is not None:
        row = attacker[0] * replicas + attacker[1]
        names[row] = f"ATTACKER  {names[row]}"
        width = extent[1] - extent[0]
        axes.add_patch(Rectangle((extent[0], row - 0.5), width, 1, fill=False, edgecolor=RED, linewidth=2.2, zorder=2))
    for name, label in zip(names, axes.set_yticklabels(names, fontsize=10), strict=True):
        if name.startswith("ATTACKER"):
            label.set(color=RED, fontweight="bold")
    warm = [event["step"] for event in events if event["kind"] == "step" and event.get("warming_up")]
    if warm:
        middle = (steps[0] + max(warm)) / 2
        _note(axes, "warm-up", (middle, 1), (0, 4), _STEP_AND_FRACTION, ha="center", color=GREY)
        axes.axvline(max(warm) + 0.5, color=GREY, linestyle=":", linewidth=1.5)
    if attack_start is not None:
        _note(axes, "attack starts", (attack_start - 0.5, 1), (0, 4), _STEP_AND_FRACTION, ha="center", color=RED)
        axes.axvline(attack_start - 0.5, color=RED, linestyle="--", linewidth=1.8)
    bar = figure.colorbar(image, ax=axes, pad=0.015, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["0.1", "1 = fence", "10"], fontsize=10)
    bar.set_label("score of the worst message a worker sent", fontsize=10, labelpad=8)
    axes.set_xlabel("training step", fontsize=12)
    axes.legend(
        loc="upper right",
        bbox_to_anchor=(1.0, -0.09 - 0.35 / (stages * replicas)),
        ncols=2,
        fontsize=10,
        frameon=False,
    )
    _titles(axes, title, _CASCADE, lift=26)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _note(axes: Any, text: str, place: Any, shift: tuple[float, float], where: Any = "data", **style: Any) -> None:
    """Text at ``place``, given in the coordinates ``where``, moved by ``shift`` points."""
    style = {"fontsize": 10, **style}
    axes.annotate(text, place, xycoords=where, xytext=shift, textcoords="offset points", annotation_clip=False, **style)


def _titles(axes: Any, title: str, subtitle: str, lift: int = 8) -> None:
    height = lift + (18 if subtitle else 0)
    _note(axes, title, (0, 1), (0, height), "axes fraction", fontsize=15, fontweight="bold")
    _note(axes, subtitle, (0, 1), (0, lift), "axes fraction", fontsize=10.5, color=GREY)


def _event_line(axes: Any, step: int, text: str, colour: str, left: bool) -> None:
    axes.axvline(step - 0.5, color=colour, linestyle="--", linewidth=1.5)
    style = {"ha": "right" if left else "left", "va": "top", "fontsize": 11, "color": colour}
    _note(
        axes,
        f"{text} (step {step})",
        (step - 0.5, 0.985),
        (-6 if left else 6, 0),
        _STEP_AND_FRACTION,
        **style,
    )


def _end_labels(axes: Any, curves: Sequence[Curve], steps: int) -> None:
    """Held-out losses right of the curves' ends, moved apart so that none covers another."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    ends = []
    for curve in curves:
        line = smooth(curve.losses)
        known = line[np.isfinite(line)]
        ends.append((min(float(known[-1]), high) if known.size else high, curve))
    ends.sort(key=lambda end: end[0])
    right, place = steps * 1.01, -np.inf
    for height, curve in ends:
        place = max(height, place + gap)
        value = "not finite" if curve.final_loss is None else f"{curve.final_loss:.3f}"
        style = {"va": "center", "fontsize": 12, "fontweight": "bold", "color": curve.colour}
        _note(axes, value, (right, place), (6, 0), **style)
    _note(axes, "held-out\nloss", (right, place + gap), (6, 0), va="bottom", color=GREY)


def _marks(events: Iterable[Mapping[str, Any]], kind: str, replicas: int) -> tuple[list[int], list[int]]:
    found = [event for event in events if event["kind"] == kind]
    return [event["step"] for event in found], [event["stage"] * replicas + event["replica"] for event in found]
