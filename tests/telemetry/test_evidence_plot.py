"""The picture of the evidence says what its marks mean, and who serves which column."""

import pytest

pytest.importorskip("matplotlib")

import numpy as np

from deepspeed_sentinel.mesh import Mesh
from deepspeed_sentinel.telemetry.deals import deals
from deepspeed_sentinel.telemetry.evidence_plot import lost_columns, plot_evidence


def step(number, score=0.4, excluded=()):
    scores, out = [[score] * 3] * 4, list(excluded)
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

    def draw(*events):
        plot_evidence(tmp_path / "evidence.png", events, title="Title", attackers=[(1, 2), (2, 0)], attack_start=4)
        return figures.pop()

    return draw


def legends_of(figure):
    return [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes if axes.get_legend()]


ALARM = {"kind": "alarm", "step": 4, "stage": 1, "replica": 2, "micro_batches": [0]}
SKIPPED = {"kind": "skipped", "step": 4}


def test_legends_explain_what_there_is_and_nothing_else(drawn):
    workers, columns = legends_of(drawn(*STEPS))
    assert [text.split(":")[0] for text in workers] == ["tampers (Sentinel is not told)", "no score"]
    assert columns == ["in the step"]
    steps = [*STEPS[:4], step(4, excluded=[0, 1, 2]), step(5, excluded=[2]), *STEPS[6:]]
    everything = drawn(*steps, ALARM, SKIPPED, TWINS, conviction(5, 1, 2), PACKED)
    workers, columns, tables = (" | ".join(texts) for texts in legends_of(everything))
    for words in ("blamed", "red without a dot", "convicted", "tampers", "twin step", "red in a twin step", "no score"):
        assert words in workers
    for words in ("in the step", "left out of this step", "a convicted worker", "skipped", "dealt anew"):
        assert words in columns
    for words in ("column in the step", "a convicted worker", "tampers", "another column before"):
        assert words in tables


def strip_of(figure):
    """[column][step]: 0 in the step, 1 left out of it, 2 out with a convicted worker."""
    return figure.axes[1].images[0].get_array().tolist()


def test_strip_tells_a_column_left_out_of_a_step_from_one_with_a_convicted_worker(drawn):
    steps = [step(0), step(1, excluded=[0, 1, 2]), step(2, excluded=[2]), step(3, excluded=[0])]
    events = [*steps, conviction(2, 1, 2), dealt(3, (1, 2, 2, 0), (1, 0, 0, 2))]
    assert strip_of(drawn(*events)) == [[0, 1, 0, 2], [0, 1, 0, 0], [0, 1, 2, 0]]


def test_a_column_with_a_convicted_worker_that_is_not_left_out_is_shown_as_in(drawn):
    assert strip_of(drawn(step(0), step(1), conviction(0, 1, 2))) == [[0, 0]] * 3, "as with the action observe"


def test_columns_are_lost_from_a_conviction_to_a_release_wherever_its_worker_serves():
    events = [conviction(2, 1, 2), PACKED, {"kind": "release", "step": 8, "stage": 1, "replica": 2}]
    lost = lost_columns(events, deals(events, Mesh(4, 3)), np.array([1, 2, 5, 6, 7, 8]))
    assert [np.flatnonzero(row).tolist() for row in lost] == [[], [2], [2], [0], [0], []]


def test_tables_show_each_deal_and_the_columns_that_are_lost(drawn):
    figure = drawn(*STEPS, TWINS, conviction(5, 1, 2), PACKED, conviction(7, 2, 0))
    first, last = (axes for axes in figure.axes if axes.get_title().startswith("step"))
    assert [first.get_title(), last.get_title()] == ["steps 0 to 5", "steps 6 to 7"]
    assert [label.get_text().split() for label in first.get_xticklabels()] == [["0"], ["1"], ["2", "out"]]
    assert [label.get_text().split() for label in last.get_xticklabels()] == [["0", "out"], ["1"], ["2"]]
    assert [text.get_text() for text in last.texts if text.get_text()] == list("012210012012")


def test_attackers_are_named_and_those_who_moved_are_ringed(drawn):
    figure = drawn(*STEPS, PACKED)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [row for row, name in enumerate(names) if name.startswith("ATTACKER")] == [5, 6]
    first, last = (axes for axes in figure.axes if axes.get_title().startswith("step"))
    assert not any(text.get_bbox_patch() for text in first.texts if text.get_text().isdigit())
    ringed = [(*text.get_position(), text.get_text()) for text in last.texts if text.get_bbox_patch()]
    assert ringed == [(0.5, 1.5, "2"), (2.5, 1.5, "0")]


def test_only_the_last_deals_are_shown_beside_the_first(drawn):
    swaps = [dealt(number, (1, 2, 2, 0), (1, 0, 0, 2)) for number in range(1, 8)]
    titles = [axes.get_title() for axes in drawn(*STEPS, *swaps).axes if axes.get_title()]
    assert titles == ["step 0", "step 4", "step 5", "step 6", "step 7"]


def test_without_a_deal_there_are_no_tables(drawn):
    assert not any(axes.get_title() for axes in drawn(*STEPS, TWINS).axes)


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
