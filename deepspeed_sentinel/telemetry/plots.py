"""Pictures of a watched run, drawn from plain data: the loss curves, and what other pictures share.

Needs matplotlib, which the extra ``report`` brings. Nothing here knows DeepSpeed or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GREEN, RED, BLUE, GREY = "#2a9d5c", "#d1402f", "#2563c9", "#555555"
STEP_AND_FRACTION = ("data", "axes fraction")
WINDOW = 5  # steps that a smoothed loss is the mean of


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


def smooth(losses: Sequence[float | None], window: int = WINDOW) -> np.ndarray:
    """Mean of the finite ones among each ``window`` last losses; NaN where a step has no finite loss itself."""
    values = np.array([np.nan if loss is None or not np.isfinite(loss) else loss for loss in losses], dtype=float)
    known = np.isfinite(values)
    totals, counts = (np.cumsum([0.0, *row]) for row in (np.where(known, values, 0.0), known))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    with np.errstate(invalid="ignore"):
        return np.where(known, (totals[ends] - totals[starts]) / (counts[ends] - counts[starts]), np.nan)


def plot_losses(
    path: Path,
    curves: Sequence[Curve],
    *,
    attack_start: int,
    convicted_steps: Sequence[int],
    skipped_steps: Sequence[int] = (),
    title: str,
    subtitle: str = "",
) -> None:
    """Training loss over steps, raw (thin) and smoothed, with the attack's start, convictions and skipped steps marked.

    In a panel of its own beside it, on the same scale, the held-out loss after the last step of each run.

    Args:
        path: of the PNG.
        curves: drawn in this order.
        attack_start: the first attacked step.
        convicted_steps: in which an attacker was convicted.
        skipped_steps: of the guarded run, in which every column was left out: they have no loss.
        title, subtitle: above the picture.

    Raises:
        ValueError: there is no curve.
    """
    if not curves:
        raise ValueError("plot_losses needs at least one curve, got none.")
    plt = pyplot()
    figure, (axes, after) = plt.subplots(
        1, 2, figsize=(11, 6), dpi=150, sharey=True, gridspec_kw={"width_ratios": [6.3, 1], "wspace": 0.03}
    )
    steps = max(len(curve.losses) for curve in curves)
    finite = [value for curve in curves for value in curve.losses if value is not None and np.isfinite(value)]
    ends = [curve.final_loss for curve in curves if curve.final_loss is not None]
    # One spike of a broken run must not press the curves that matter into a line.
    top = max(float(np.quantile(finite, 0.995)) if finite else 1.0, *ends)
    bottom = min([*finite, *ends], default=0.0)
    for curve in curves:
        raw = np.array([np.nan if loss is None else loss for loss in curve.losses], dtype=float)
        axes.plot(raw, color=curve.colour, alpha=0.4, linewidth=1)
        line = (0, (3, 2)) if curve.dashed else "-"
        axes.plot(smooth(curve.losses), color=curve.colour, linewidth=2.6, linestyle=line)
    margin = 0.06 * (top - bottom)
    axes.set_ylim(bottom - 2 * margin, top + 4 * margin)
    axes.set_xlim(0, steps * 1.01)
    axes.axvspan(attack_start - 0.5, steps * 1.01, color=RED, alpha=0.05, linewidth=0)
    _event_line(axes, attack_start, f"attack starts (step {attack_start})", RED, left=True)
    for step in convicted_steps:
        # They may lie too near for a label each.
        text = f"convicted in {' and '.join(map(str, sorted(set(convicted_steps))))}"
        late = step > 0.7 * steps
        _event_line(axes, step, text if step == max(convicted_steps) else "", BLUE, left=late, line=int(late))
    axes.set_xlabel("training step", fontsize=12)
    axes.set_ylabel("loss (nats per token)", fontsize=12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _held_out(after, curves, top)
    _legend(axes, curves, skipped_steps)
    titles(axes, title, subtitle, lift=62)
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


def _event_line(axes: Any, step: int, text: str, colour: str, left: bool, line: int = 0) -> None:
    axes.axvline(step - 0.5, color=colour, linestyle="--", linewidth=1.5)
    style = {"ha": "right" if left else "left", "va": "top", "fontsize": 11, "color": colour}
    note(
        axes,
        text,
        (step - 0.5, 0.985),
        (-6 if left else 6, -16 * line),
        STEP_AND_FRACTION,
        **style,
    )


def _held_out(axes: Any, curves: Sequence[Curve], top: float) -> None:
    """A mark for each run at its held-out loss, and the number beside it, moved so that none covers another."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    place = -np.inf
    for curve in sorted(curves, key=lambda curve: np.inf if curve.final_loss is None else curve.final_loss):
        height = top if curve.final_loss is None else curve.final_loss
        place = max(height, place + gap)
        value = "not finite" if curve.final_loss is None else f"{curve.final_loss:.3f}"
        if curve.final_loss is not None:
            axes.plot([0.16, 0.3], [height, place], color=curve.colour, linewidth=0.8)
            axes.scatter([0.16], [height], s=70, marker="D", color=curve.colour, zorder=3)
        axes.text(0.36, place, value, va="center", fontsize=12, fontweight="bold", color=curve.colour)
    axes.set_xlim(0, 1)
    axes.text(0.5, 0.985, "held-out loss\nat the end", fontsize=11, color=GREY, ha="center", va="top",
        transform=axes.transAxes)  # fmt: skip
    axes.set_xticks([])
    axes.set_facecolor("#f4f4f4")
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)


def _legend(axes: Any, curves: Sequence[Curve], skipped_steps: Sequence[int]) -> None:
    from matplotlib.lines import Line2D

    def key(label: str, **style: Any) -> Any:
        return Line2D([], [], label=label, **style)

    keys = [
        key(curve.label, color=curve.colour, linewidth=2.6, linestyle=(0, (3, 2)) if curve.dashed else "-")
        for curve in curves
    ]
    keys += [
        key("thin: training loss of each step", color=GREY, alpha=0.5, linewidth=1),
        key(f"thick: mean of the last {WINDOW} steps", color=GREY, linewidth=2.6),
        key("held-out loss, measured without tampering", color=GREY, linestyle="", marker="D", markersize=7),
    ]
    if skipped_steps:
        # Upon the lower edge, since such a step has no loss.
        style = {"color": BLUE, "linestyle": "", "marker": "x", "markersize": 8, "markeredgewidth": 2.2}
        axes.plot(skipped_steps, [0.03] * len(skipped_steps), transform=axes.get_xaxis_transform(), **style)
        named = ", ".join(map(str, skipped_steps)) if len(skipped_steps) < 6 else f"{len(skipped_steps)} steps"
        keys.append(key(f"guarded: skipped, all columns left out ({named})", **style))
    if any(loss is None for curve in curves for step, loss in enumerate(curve.losses) if step not in skipped_steps):
        keys.append(key("a gap in a line: loss not finite", linestyle=""))
    # Above the axes: there it covers no data, whatever the curves do.
    axes.legend(
        handles=keys, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, fontsize=10, frameon=False,
        columnspacing=1.4,
    )  # fmt: skip
