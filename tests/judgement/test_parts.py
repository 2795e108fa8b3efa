import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deepspeed_sentinel.judgement.grounds import grounds
from deepspeed_sentinel.judgement.record import Record, Tried
from deepspeed_sentinel.judgement.robust import quantiles, shortest_interval
from deepspeed_sentinel.mesh import Mesh


@given(
    hnp.arrays(np.float64, (3, 9), elements=st.floats(-1e6, 1e6) | st.just(np.nan)),
    st.floats(0, 1),
)
def test_quantiles_equal_numpy_on_what_is_there(values, probability):
    (ours,) = quantiles(values, (probability,))
    for row, result in zip(values, ours, strict=True):
        there = row[~np.isnan(row)]
        if there.size:
            assert result == pytest.approx(np.quantile(there, probability), rel=1e-9, abs=1e-6)
        else:
            assert np.isnan(result)


@given(
    hnp.arrays(np.float64, (3, 9), elements=st.floats(-1e6, 1e6) | st.just(np.nan)),
    st.floats(0.01, 1),
)
def test_shortest_interval_by_trying_all(values, share):
    for row, length in zip(values, shortest_interval(values, share), strict=True):
        there = row[~np.isnan(row)]
        if not there.size:
            assert np.isnan(length)
            continue
        holds = [
            high - low
            for low in there
            for high in there
            if low <= high and np.count_nonzero((there >= low) & (there <= high)) >= share * there.size
        ]
        assert length == min(holds)


def test_strikes_must_fall_within_the_window():
    mesh = Mesh(3, 1)
    record = Record(mesh, strikes=2, window=3, probation=100)
    strike, none = np.array([[False], [True], [False]]), np.zeros((3, 1), bool)
    quiet = np.zeros((2, 1), bool)
    for struck in (strike, none, none, strike, none, none):
        newly = record.update(struck, quiet).convicted
        assert not newly.any()
    record.update(strike, quiet)
    newly = record.update(strike, quiet).convicted
    assert newly[1, 0]


def test_a_stage_that_is_unlike_by_nature_is_so_until_it_was_alike_many_times_in_a_row():
    """What differs now and then is the same most of the time."""
    record, nobody, stages = Record(Mesh(4, 3), 3, 20, 50, by_proof=True), np.zeros((4, 3), bool), np.zeros(4, bool)

    def trial(unlike=False, alike=True, split=False, held=True):
        of_stages = stages | np.array(unlike, bool), stages | alike, stages | split
        record.update(nobody, np.zeros((3, 3), bool), Tried(nobody, ~nobody, *of_stages, held))
        return record.unlike.tolist()

    second = [False, True, False, False]
    assert trial() == [False] * 4 and trial(unlike=second, alike=False) == second
    assert all(trial() == second for _ in range(7)) and trial(alike=False, split=True) == second
    assert all(trial() == second for _ in range(7))
    assert trial(alike=False) == second, "too few of it could be compared to tell"
    assert trial(alike=False, held=False) == second, "that was no twin step"
    assert trial() == [False] * 4


@pytest.mark.parametrize("by_proof", [False, True])
def test_a_step_can_be_entered_again(by_proof):
    mesh = Mesh(4, 2)
    one, other = (Record(mesh, strikes=2, window=3, probation=4, by_proof=by_proof) for _ in range(2))
    rng = np.random.default_rng(0)
    quiet = np.zeros((3, 2), bool)
    for _ in range(40):
        struck, disputed = rng.random((4, 2)) < 0.4, rng.random((3, 2)) < 0.2
        shown = Tried(
            rng.random((4, 2)) < 0.1,
            rng.random((4, 2)) < 0.3,
            rng.random(4) < 0.1,
            rng.random(4) < 0.5,
            rng.random(4) < 0.5,
            rng.random() < 0.5,
        )
        step = {"tried": shown if rng.random() < 0.3 else None, "refused": bool(rng.random() < 0.3)}
        one.update(struck, quiet, **step)
        mine, theirs = one.update_again(struck, disputed), other.update(struck, disputed, **step)
        for name in ("convicted", "released", "cleared"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
        for name, state in one.state_dict().items():
            assert np.array_equal(state, other.state_dict()[name]), name


OWN, PAIR, QUIET = 3.0, 2.0, 0.1


@pytest.mark.parametrize(
    ("own", "fenced", "rests_on_pair", "telling"),
    [
        ([QUIET, QUIET], [PAIR, QUIET], True, (4,)),
        ([OWN, QUIET], [PAIR, PAIR], False, (4, 6)),
        ([QUIET, QUIET], [QUIET, 0.9], True, (4, 6)),  # the sums
    ],
)
def test_what_a_finding_rests_on(own, fenced, rests_on_pair, telling):
    found = grounds(np.array(own), np.array(fenced), np.zeros(2, bool), np.array([4, 6]))
    assert (found.rests_on_pair, found.telling) == (rests_on_pair, telling)


def test_what_content_would_explain_but_for_the_pair_rests_on_the_pair():
    own, fenced, micro_batches = np.array([OWN, OWN]), np.array([0.9, 0.1]), np.array([4, 6])
    found = grounds(own, fenced, np.array([True, True]), micro_batches)
    assert (found.rests_on_pair, found.telling) == (True, (4,)), "conspicuous is enough to speak against content"
    assert not grounds(own, fenced, np.array([True, False]), micro_batches).rests_on_pair
