"""The picture of the evidence says what its marks mean, and who serves which column."""

import pytest

pytest.importorskip("matplotlib")

import numpy as np
from matplotlib.colors import to_hex

from deepspeed_sentinel.mesh import Mesh
from deepspeed_sentinel.telemetry.deals import deals
from deepspeed_sentinel.telemetry.evidence_plot import plot_evidence


def step(number, score=0.4, excluded=()):
    scores, out = [[score if number > 1 else 0.0] * 3] * 4, list(excluded)
    return {"kind": "step", "step": number, "scores": scores, "excluded": out, "warming_up": number < 2}


def conviction(number, stage, replica):
    return {"kind": "conviction", "step": number, "stage": stage, "replica": replica}


def dealt(number, *moved):
    return {"kind": "wiring", "step": number, "moved": [list(move) for move in moved]}


TWINS = {"kind": "twins", "step": 5, "suspects": [[1, 2]]}
PACKED = dealt(6, (1, 2, 2, 0), (1, 0, 0, 2))
STEPS = [step(number, score=0.0 if number == 5 else 0.4) for number in range(8)]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws events, and returns the figure."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **style: figures.append(self))

    def draw(*events, attackers=((1, 2), (2, 0)), attack_start=4):
        plot_evidence(tmp_path / "evidence.png", events, title="Title", attackers=attackers, attack_start=attack_start)
        return figures.pop()

    return draw


ALARM = {"kind": "alarm", "step": 4, "stage": 1, "replica": 2, "micro_batches": [0]}
PROOF = {"kind": "proof", "step": 5, "stage": 1, "replica": 2}
DIFFERENCE = {"kind": "difference", "step": 6, "workers": [[2, 0]]}
SKIPPED = {"kind": "skipped", "step": 4}
FOUND = [*STEPS[:4], step(4, 3.0, excluded=[0, 1, 2]), step(5, 0.0, excluded=[2]), *STEPS[6:]]
EVERYTHING = [*FOUND, ALARM, SKIPPED, TWINS, PROOF, conviction(5, 1, 2), DIFFERENCE, PACKED]


def keys_of(figure):
    (legend,) = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
    return dict(zip((text.get_text() for text in legend.get_texts()), legend.legend_handles, strict=True))


def headlines_of(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_size() == 12.5]


def words_of(axes):
    return [text.get_text() for text in axes.texts]


def test_one_legend_explains_what_there_is_and_nothing_else(drawn):
    quiet = list(keys_of(drawn(*STEPS)))
    assert [text.split(";")[0].split(":")[0] for text in quiet] == ["inside the fences", "no score", "column counts"]
    every = " | ".join(keys_of(drawn(*EVERYTHING)))
    for words in ("ALARM", "behind such a worker", "contradicts", "twin step", "no score: warm-up", "convicted: framed",
                  "column counts", "left out of the step", "skipped", "dealt anew"):  # fmt: skip
        assert words in every
    assert "in all tables" in every
    assert "in all tables" not in " | ".join(keys_of(drawn(*FOUND, TWINS, conviction(5, 1, 2)))), "there are none"


def test_no_colour_means_two_things(drawn):
    keys = keys_of(drawn(*EVERYTHING))
    seen = [
        (to_hex(key.get_facecolor()), to_hex(key.get_edgecolor()), key.get_hatch())
        if hasattr(key, "get_hatch")
        else key.get_marker()
        for key in keys.values()
    ]
    assert len(set(seen)) == len(keys) == 11


def test_each_panel_says_what_to_see(drawn):
    assert headlines_of(drawn(*EVERYTHING)) == [
        "Score of each worker's worst message: above 1 is outside the fences, an alarm",
        "Which columns counted: 3 of 3 in the last step",
        "Who served which column: dealt anew for step 6",
    ]
    assert headlines_of(drawn(step(0), step(1, excluded=[1])))[1:] == ["Which columns counted: 2 of 3 in the last step"]


def test_cells_have_the_colours_of_the_legend(drawn):
    figure = drawn(*EVERYTHING[:3], step(3, 1.0), *EVERYTHING[4:])
    image = figure.axes[0].images[0]
    shown = {text.split(":")[0].split(";")[0]: to_hex(key.get_facecolor()) for text, key in keys_of(figure).items()
             if hasattr(key, "get_hatch")}  # fmt: skip
    colours = [[to_hex(one) for one in row] for row in image.to_rgba(image.get_array())]
    row = [colours[5][number] for number in (4, 5)]
    assert row == [shown["ALARM"]] * 2, "an alarm, then a proof"
    assert colours[0][3] == shown["inside the fences"], "a score of 1 is on the fence"
    assert colours[9][4] == shown["outside too, but behind such a worker"]
    assert colours[6][6] == shown["contradicts another"]
    columns = figure.axes[1].images[0]
    strip = [[to_hex(one) for one in row] for row in columns.to_rgba(columns.get_array())]
    out, counts = shown["column left out of the step"], shown["column counts"]
    assert strip[2] == [*[counts] * 4, out, out, counts, counts]


def test_a_long_run_keeps_an_alarm_of_one_step(drawn):
    steps = [step(number, excluded=[1] * (number == 777)) for number in range(1500)]
    figure = drawn(*steps, {**ALARM, "step": 777})
    workers, columns = (figure.axes[panel].images[0] for panel in (0, 1))
    assert workers.get_array().shape == (12, 375) and (workers.get_array() > 3).sum() == 1
    assert columns.get_array().sum() == 1
    left, right, _, _ = workers.get_extent()
    assert (left, right) == (-0.5, 1499.5)


def frames_of(axes):
    return [(*patch.get_xy(), patch.get_width()) for patch in axes.patches if patch.get_edgecolor()[:3] == (0, 0, 0)]


def test_a_conviction_is_framed_from_its_step_on_and_said_beside_the_row(drawn):
    figure = drawn(*STEPS, conviction(5, 1, 2))
    assert frames_of(figure.axes[0]) == [(4.5, 4.5, 3.0)]
    said = {text.get_text(): text.xy[1] for text in figure.axes[0].texts if "convicted" in text.get_text()}
    assert said == {"convicted in step 5": 5, "tampers, never convicted": 6}
    released = drawn(*STEPS, conviction(2, 1, 2), {"kind": "release", "step": 4, "stage": 1, "replica": 2})
    assert frames_of(released.axes[0]) == [(1.5, 4.5, 2.0)]


def test_a_run_without_a_conviction_and_without_known_attackers(drawn):
    figure = drawn(*STEPS, attackers=(), attack_start=None)
    assert len(figure.axes) == 2 and frames_of(figure.axes[0]) == []
    assert not any("convicted" in words or "tamper" in words for axes in figure.axes for words in words_of(axes))
    assert words_of(figure.axes[1])[:3] == ["goes on"] * 3


def test_crosses_stand_in_each_column_of_a_skipped_step_and_triangles_at_the_edge_of_a_new_deal(drawn):
    crosses, triangles = (marks.get_offsets().tolist() for marks in drawn(*EVERYTHING).axes[1].collections)
    assert crosses == [[4, 0], [4, 1], [4, 2]] and [x for x, _ in triangles] == [5.5]


def test_the_strip_says_what_holds_of_each_column_at_the_end(drawn):
    figure = drawn(step(0), step(1, excluded=[0, 2]), step(2, excluded=[2]), step(3, excluded=[2]))
    assert words_of(figure.axes[1])[:3] == ["goes on", "goes on", "left out since step 1"]


def test_attackers_are_named_and_those_who_moved_are_ringed(drawn):
    figure = drawn(*STEPS, PACKED)
    labels = figure.axes[0].get_yticklabels()
    assert [row for row, label in enumerate(labels) if label.get_fontweight() == "bold"] == [5, 6]
    assert "tampering starts, by the workers in bold" in words_of(figure.axes[0])
    first, last = tables_of(figure)
    assert not any(text.get_bbox_patch() for text in first.texts)
    ringed = [(*text.get_position(), text.get_text()) for text in last.texts if text.get_bbox_patch()]
    assert ringed == [(0.5, 1.5, "2"), (2.5, 1.5, "0")]


def tables_of(figure):
    return [axes for axes in figure.axes if axes.get_title().startswith("step")]


def test_tables_show_each_deal_the_convicted_and_the_columns_left_out(drawn):
    steps = [step(number, excluded=[2] if number == 5 else [0] if number > 5 else []) for number in range(8)]
    figure = drawn(*steps, TWINS, conviction(5, 1, 2), PACKED)
    first, last = tables_of(figure)
    assert [first.get_title(), last.get_title()] == ["steps 0 to 5", "steps 6 to 7"]
    assert [label.get_text().split() for label in first.get_xticklabels()] == [["0"], ["1"], ["2"]]
    assert [label.get_text().split() for label in last.get_xticklabels()] == [["0", "out"], ["1"], ["2"]]
    assert [text.get_text() for text in last.texts] == list("012210012012")
    for axes, place in ((first, 5), (last, 3)):
        colours = [to_hex(cell.get_facecolor()[0]) for cell in axes.collections]
        assert [at for at, colour in enumerate(colours) if colour == "#000000"] == [place], "stage 1, replica 2"


def test_a_table_says_in_which_of_its_steps_no_column_counted(drawn):
    said = [[text for text in words_of(axes) if "all out" in text] for axes in tables_of(drawn(*EVERYTHING))]
    assert said == [["all out in step 4"], []], "most of the steps from 0 to 5 counted"
    twice = [step(number, excluded=[0, 1, 2] if number in (2, 4) else []) for number in range(8)]
    assert "all out in 2 steps" in words_of(tables_of(drawn(*twice, PACKED))[0])
    always = [step(number, excluded=[0, 1, 2] if number > 5 else []) for number in range(8)]
    assert not any("all out" in text for text in words_of(tables_of(drawn(*always, PACKED))[1])), "each says so"


def test_only_the_last_deals_are_shown_beside_the_first(drawn):
    swaps = [dealt(number, (1, 2, 2, 0), (1, 0, 0, 2)) for number in range(1, 8)]
    figure = drawn(*STEPS, *swaps)
    titles = [axes.get_title() for axes in tables_of(figure)]
    assert titles == ["step 0", "step 4", "step 5", "step 6", "step 7"]
    assert headlines_of(figure)[2].endswith("dealt anew 7 times; the first and the last 4 deals")


def test_without_a_deal_there_are_no_tables(drawn):
    assert tables_of(drawn(*STEPS, TWINS)) == [] and len(drawn(*STEPS, TWINS).axes) == 2


@pytest.mark.parametrize(("stages", "replicas"), [(16, 8), (22, 8)])
def test_a_large_mesh_is_legible(drawn, stages, replicas):
    """No text lies upon another, the page stays a page, and the tables have the stages in which somebody moved."""
    steps = [{**step(number), "scores": [[0.4] * replicas] * stages} for number in range(8)]
    bad = [(9, replica) for replica in range(6)]
    events = [*steps, *(conviction(4, *worker) for worker in bad), dealt(6, (9, 5, 5, 6), (9, 6, 6, 5))]
    figure = drawn(*events, attackers=bad)
    width, height = figure.get_size_inches()
    assert height < 1.4 * width
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"stage {stage}" for stage in range(stages)]
    said = [text for text in figure.axes[0].texts if "convicted in step" in text.get_text()]
    assert [text.get_text() for text in said] == [f"stage 9, replica {one}: convicted in step 4" for one in range(6)]
    row = 72 * height * figure.axes[0].get_position().height / (stages * replicas)
    assert stages * replicas > 100 and min(np.diff([text.get_position()[1] for text in said])) * row > 12, "points"
    assert min(label.get_fontsize() for label in figure.axes[0].get_yticklabels()) < replicas * row
    _, last = tables_of(figure)
    assert [text.get_text() for text in last.texts] == list("01234657")


def test_more_convictions_than_have_room_are_counted(drawn):
    steps = [{**step(0), "scores": [[0.4] * 64] * 2}]
    figure = drawn(*steps, *(conviction(0, 1, replica) for replica in range(60)), attackers=())
    said = [words for words in words_of(figure.axes[0]) if "convicted in step" in words]
    assert 20 < len(said) < 60 and f"and {60 - len(said)} more" in words_of(figure.axes[0])


def test_steps_must_have_been_recorded(tmp_path):
    with pytest.raises(ValueError, match='"events": "steps"'):
        plot_evidence(tmp_path / "evidence.png", [TWINS], title="Title")


def test_deals_follow_moves_convictions_and_releases():
    released = {"kind": "release", "step": 8, "stage": 1, "replica": 2}
    events = [conviction(5, 1, 2), PACKED, conviction(7, 2, 0), dealt(8, (2, 0, 0, 1), (2, 1, 1, 0)), released]
    first, second, third = deals(events, Mesh(4, 3))
    assert [first.step, second.step, third.step] == [0, 6, 8]
    np.testing.assert_array_equal(second.wiring, [[0, 1, 2], [2, 1, 0], [0, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(third.wiring[2], [1, 0, 2])
    assert first.lost.tolist() == [False, False, True]
    assert second.lost.tolist() == [True, False, False], "both convicted workers serve column 0"
    assert third.lost.tolist() == [False, True, False], "one moved to column 1, and the other was released"


def test_another_machine_in_a_convicted_place_loses_no_column():
    replaced = {"kind": "replaced", "step": 8, "stage": 1, "replica": 2}
    assert not deals([conviction(5, 1, 2), replaced], Mesh(4, 3))[-1].lost.any()


def test_a_run_that_goes_on_in_the_same_folder_starts_from_deepspeeds_own():
    """Its first moves are told from there: put upon those of the run before, no worker would serve some columns."""
    start = {"kind": "start", "step": 8}
    swap, back = dealt(6, (1, 2, 2, 0), (1, 0, 0, 2)), dealt(8, (1, 2, 2, 1), (1, 1, 1, 2))
    first, before, after = deals([{**start, "step": 0}, swap, start, back], Mesh(4, 3))
    assert [first.step, before.step, after.step] == [0, 6, 8]
    assert before.wiring[1].tolist() == [2, 1, 0] and after.wiring[1].tolist() == [0, 2, 1]
    assert deals([swap, start], Mesh(4, 3))[-1].wiring.tolist() == [[0, 1, 2]] * 4, "it may take over nothing"
