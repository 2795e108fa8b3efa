"""Pictures of a watched run, drawn from plain data: the loss curves, and what other pictures share.

Needs matplotlib: ``pip install "deepspeed-sentinel[report]"``. Nothing here knows DeepSpeed or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GREEN, RED, BLUE, GREY = "#2a9d5c", "#d1402f", "#2563c9", "#555555"
STEP_AND_FRACTION = ("data", "axes fraction")


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
    convicted_steps: Sequence[int],
    title: str,
    subtitle: str = "",
) -> None:
    """Training loss over steps, raw (faint) and smoothed, with the attack's start and the convictions marked.

    The curves' ends are labelled with the held-out loss.

    Args:
        path: of the PNG.
        curves: drawn in this order.
        attack_start: the first attacked step.
        convicted_steps: in which an attacker was convicted.
        title, subtitle: above the picture.

    Raises:
        ValueError: there is no curve.
    """
    if not curves:
        raise ValueError("plot_losses needs at least one curve, got none.")
    plt = pyplot()
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
    _event_line(axes, attack_start, f"attack starts (step {attack_start})", RED, left=True)
    for step in convicted_steps:
        # They may lie too near for a label each.
        named = " and ".join(map(str, sorted(set(convicted_steps))))
        _event_line(axes, step, f"convicted in {named}" if step == max(convicted_steps) else "", BLUE, left=False)
    _end_labels(axes, curves, steps)
    axes.set_xlabel("training step", fontsize=12)
    axes.set_ylabel("training loss (nats per token)", fontsize=12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # Above the axes: there it covers no data, whatever the curves do.
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, fontsize=11, frameon=False)
    titles(axes, title, subtitle, lift=38)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def note(axes: Any, text: str, place: Any, shift: tuple[float, float], where: Any = "data", **style: Any) -> None:
    """Text at ``place``, given in the coordinates ``where``, moved by ``shift`` points."""
    style = {"fontsize": 10, **style}
    axes.annotate(text, place, xycoords=where, xytext=shift, textcoords="offset points", annotation_clip=False, **style)


def titles(axes: Any, title: str, subtitle: str, lift: int = 8) -> None:
    height = lift + (18 if subtitle else 0)
    note(axes, title, (0, 1), (0, height), "axes fraction", fontsize=15, fontweight="bold")
    note(axes, subtitle, (0, 1), (0, lift), "axes fraction", fontsize=10.5, color=GREY)


def _event_line(axes: Any, step: int, text: str, colour: str, left: bool) -> None:
    axes.axvline(step - 0.5, color=colour, linestyle="--", linewidth=1.5)
    style = {"ha": "right" if left else "left", "va": "top", "fontsize": 11, "color": colour}
    note(
        axes,
        text,
        (step - 0.5, 0.985),
        (-6 if left else 6, 0),
        STEP_AND_FRACTION,
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
        note(axes, value, (right, place), (6, 0), **style)
    note(axes, "held-out\nloss", (right, place + gap), (6, 0), va="bottom", color=GREY)
