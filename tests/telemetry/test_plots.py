"""The picture of the loss: what each line and mark is stands in it, and every number at its own height."""

import pytest

pytest.importorskip("matplotlib")

import numpy as np

from deepspeed_sentinel.telemetry import plots
from deepspeed_sentinel.telemetry.plots import Curve, plot_losses, smooth

LOSSES = [5.0 - step / 10 for step in range(20)]
BROKEN = [*LOSSES[:10], None, *LOSSES[11:]]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws runs with these held-out losses, and returns the figure."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **style: figures.append(self))

    def draw(*final_losses, losses=LOSSES, convicted=(12,), skipped=()):
        colours = ("red", "green", "blue")
        curves = [Curve(colour, losses, final, colour) for colour, final in zip(colours, final_losses, strict=False)]
        more = {"convicted_steps": convicted, "skipped_steps": skipped, "title": "Title"}
        plot_losses(tmp_path / "loss.png", curves, attack_start=10, **more)
        return figures.pop()

    return draw


def legend_of(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_smoothed_is_the_mean_of_the_last_finite_steps():
    np.testing.assert_allclose(smooth([1.0, 3.0, 5.0, 7.0], window=2), [1, 2, 4, 6])
    np.testing.assert_allclose(smooth([1.0, None, 5.0, float("inf"), 7.0], window=3), [1, np.nan, 3, np.nan, 6])
    assert smooth([]).shape == (0,) and np.isnan(smooth([None, None])).all()


def test_held_out_losses_stand_beside_the_curves_at_their_own_height(drawn):
    after = drawn(4.2, 2.71, 2.7).axes[1]
    heights = [float(mark.get_offsets()[0][1]) for mark in after.collections]
    assert heights == [2.7, 2.71, 4.2]
    numbers = {text.get_text(): text.get_position()[1] for text in after.texts}
    assert numbers["4.200"] == 4.2
    assert numbers["2.710"] - numbers["2.700"] > 0.1, "moved apart, or one covers the other"
    assert any(text.startswith("held-out loss") for text in numbers)


def test_a_held_out_loss_beyond_the_curves_is_in_the_picture(drawn):
    low, high = drawn(9.0, 0.5).axes[1].get_ylim()
    assert low < 0.5 and high > 9.0


def test_a_held_out_loss_that_is_not_finite_has_no_mark(drawn):
    after = drawn(None, 2.7).axes[1]
    assert len(after.collections) == 1
    assert [text.get_text() for text in after.texts].count("not finite") == 1


def test_legend_explains_what_there_is_and_nothing_else(drawn):
    always = legend_of(drawn(2.7))
    assert always[0] == "red"
    assert any("each step" in text for text in always)
    assert any(f"mean of the last {plots.WINDOW} steps" in text for text in always)
    assert any("held-out loss" in text for text in always)
    assert not any("skipped" in text or "gap" in text for text in always)
    assert any("gap" in text for text in legend_of(drawn(2.7, losses=BROKEN)))
    skipping = legend_of(drawn(2.7, losses=BROKEN, skipped=[10]))
    assert any("skipped, all columns left out (10)" in text for text in skipping)
    assert not any("gap" in text for text in skipping), "the cross says why"


def test_there_must_be_a_curve(drawn):
    with pytest.raises(ValueError, match="at least one curve"):
        drawn()
