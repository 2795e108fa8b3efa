"""What is to be seen of each worker and column in each step follows from the events, also of long and mended runs."""

import numpy as np
import pytest

from deepspeed_sentinel.telemetry.cells import (
    AT_ODDS,
    BEHIND,
    NAMED,
    Convicted,
    cells_of,
    convictions_of,
    drawn_together,
    runs_of,
)


def step(number, scores, excluded=(), warming_up=False):
    return {"kind": "step", "step": number, "scores": scores, "excluded": list(excluded), "warming_up": warming_up}


def about(kind, number, stage, replica, **more):
    return {"kind": kind, "step": number, "stage": stage, "replica": replica, **more}


def test_a_cell_tells_who_is_to_blame_from_who_stands_behind():
    alarm = about("alarm", 3, 0, 1, micro_batches=[0])
    cells = cells_of([step(3, [[0.5, 7.0], [0.0, 3.0], [None, 1.0]], excluded=[1]), alarm])
    np.testing.assert_array_equal(cells.workers[0], [[0.5, NAMED], [np.nan, BEHIND], [np.nan, 1.0]])
    assert cells.out.tolist() == [[False, True]] and (cells.first, cells.last) == (3, 3)


@pytest.mark.parametrize("kind", ["alarm", "proof", "contradicted", "replay"])
def test_whoever_an_event_names_is_named_whatever_its_score(kind):
    scores = [[0.0, 0.2], [0.2, 0.2]]
    assert cells_of([step(0, scores), about(kind, 0, 0, 0)]).workers[0, 0, 0] == NAMED


def test_who_is_at_odds_is_not_named_unless_an_audit_tells():
    scores = [[0.2, 0.2], [0.2, 0.2]]
    dispute = {"kind": "dispute", "step": 0, "sender": [0, 1], "receiver": [1, 1], "at_fault": None}
    difference = {"kind": "difference", "step": 1, "workers": [[1, 0], [1, 1]]}
    cells = cells_of([step(0, scores), dispute, step(1, scores), difference]).workers
    np.testing.assert_array_equal(cells == AT_ODDS, [[[False, True], [False, True]], [[False, False], [True, True]]])
    told = cells_of([step(0, scores), {**dispute, "at_fault": [1, 1]}]).workers[0]
    np.testing.assert_array_equal(told, [[0.2, 0.2], [0.2, NAMED]])
    proof = about("proof", 1, 1, 0)
    assert cells_of([step(1, scores), proof, difference]).workers[0, 1].tolist() == [NAMED, AT_ODDS]


def test_steps_that_were_not_recorded_are_empty_and_the_later_of_two_counts():
    events = [step(2, [[0.5]], excluded=[0], warming_up=True), step(5, [[0.3]]), step(2, [[0.1]])]
    beside = [{"kind": "twins", "step": 5}, {"kind": "skipped", "step": 3}, {"kind": "skipped", "step": 9}]
    cells = cells_of([*events, *beside, {"kind": "end", "step": 6}])
    np.testing.assert_array_equal(cells.workers[:, 0, 0], [0.1, np.nan, np.nan, 0.3])
    assert cells.out.ravel().tolist() == [False] * 4 and not cells.warming_up.any()
    assert cells.twins.tolist() == [False, False, False, True]
    assert cells.skipped.tolist() == [False, True, False, False]


def test_a_conviction_lasts_to_a_release_or_to_the_end():
    convicted = [about("conviction", 3, 1, 2), about("conviction", 5, 1, 0), about("conviction", 6, 1, 2)]
    released = [about("release", 8, 1, 2), about("conviction", 9, 1, 2), about("replaced", 12, 1, 0)]
    first, second, third = convictions_of([*convicted, *released], 20)
    assert (first, second, third) == (Convicted(1, 2, 3, 7), Convicted(1, 0, 5, 11), Convicted(1, 2, 9, 20))


def test_what_lasts_one_step_of_a_long_run_is_not_lost():
    rows = np.full((2003, 2), 0.1)
    rows[1502, 1] = NAMED
    rows[:3, 0] = np.nan
    together, each = drawn_together(rows, 400)
    assert each == 6 and together.shape == (334, 2)
    assert np.flatnonzero(together[:, 1] == NAMED).tolist() == [1502 // 6]
    assert together[0, 0] == 0.1, "three of its six steps have a score"
    same, each = drawn_together(rows[:400], 400)
    assert each == 1
    np.testing.assert_array_equal(same, rows[:400])


def test_runs():
    assert runs_of(np.array([True, True, False, True])) == [(0, 1), (3, 3)]
    assert runs_of(np.zeros(3, bool)) == []
