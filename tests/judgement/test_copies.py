"""Both ends of a link measure against a baseline of their own: what all columns show alike is of these copies."""

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.table import NAMES, RECEIVED, SENT, TO_BASELINE
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Worker

OF_COPIES = np.flatnonzero(TO_BASELINE)
LINK, SIGN_FLIP = 2, NAMES.index("sign_flip")


@pytest.fixture
def world():
    world = World(replicas=5)
    world.warm_up()
    return world


@pytest.mark.parametrize("end", [SENT, RECEIVED])
@pytest.mark.parametrize("factor", [0.5, 3.0, float("nan")])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_a_copy_that_went_another_way_sets_nobody_at_odds(world, end, factor, direction):
    def drifted(values):
        of_end = values[end, direction, LINK]
        angles = np.arcsin(np.sqrt(of_end[..., SIGN_FLIP])) + 0.1 * np.log(factor)
        of_end[..., OF_COPIES] *= factor
        of_end[..., SIGN_FLIP] = np.sin(angles) ** 2

    for _ in range(3):
        verdict = world.step(drifted)
        assert not verdict.disputed and not verdict.findings and not verdict.excluded.any()


@pytest.mark.parametrize("statistic", OF_COPIES)
@pytest.mark.parametrize("factor", [0.2, 5.0, float("nan")])
def test_one_columns_end_that_reports_something_else_is_still_in_dispute(world, statistic, factor):
    def lie(values):
        values[SENT, FORWARD, LINK][..., OF_COPIES] *= 1.5  # beside a copy that went another way
        values[RECEIVED, FORWARD, LINK, 3, :, statistic] *= factor

    verdict = world.step(lie)
    assert [(one.column, one.sender) for one in verdict.disputed] == [(3, Worker(2, 3))]
    assert np.flatnonzero(verdict.excluded).tolist() == [3]


def test_where_most_columns_differ_each_in_its_own_way_the_copies_do(world):
    def noisy(values):
        of_end = values[SENT, BACKWARD, LINK]
        of_end[..., OF_COPIES] *= np.exp(np.linspace(-2.0, 2.0, of_end[..., OF_COPIES].size)).reshape(
            of_end[..., OF_COPIES].shape
        )

    assert not world.step(noisy).disputed


def test_what_does_not_rest_on_copies_has_no_such_room(world):
    def changed(values):
        values[SENT, FORWARD, LINK, ..., NAMES.index("energy")] *= 5.0

    assert len(world.step(changed).disputed) == 5


@pytest.mark.parametrize(
    ("replicas", "senders", "receivers"), [(3, [0], [1]), (5, [0, 1], [2]), (8, [0, 1, 2], [3, 4])]
)
def test_minorities_of_both_ends_cannot_clear_each_other_and_accuse_an_honest_sender(replicas, senders, receivers):
    world = World(replicas=replicas)
    world.warm_up()

    def lie(values):
        values[SENT, FORWARD, LINK, senders, :, OF_COPIES[0]] *= 1e6
        values[RECEIVED, FORWARD, LINK, receivers, :, OF_COPIES[0]] *= 1e6

    for _ in range(4):
        verdict = world.step(lie)
        assert not any(finding.strikes for finding in verdict.findings) and not verdict.convicted.any()
        assert not verdict.excluded[[c for c in range(replicas) if c not in (*senders, *receivers)]].any()


def test_two_liars_that_shift_what_all_seem_to_show_set_no_honest_column_at_odds():
    """One says less of what it sent, the other more of what it got: together they are most of three columns."""
    world = World(replicas=3)
    world.warm_up()

    def lie(values):
        values[SENT, FORWARD, LINK, 0, :, OF_COPIES[0]] *= 1e-6
        values[RECEIVED, FORWARD, LINK, 1, :, OF_COPIES[0]] *= 1e6

    for _ in range(4):
        verdict = world.step(lie)
        assert not verdict.excluded[2] and not any(finding.strikes for finding in verdict.findings)


def test_an_alarm_in_which_the_ends_differ_is_no_strike_and_says_so(world):
    def drifted(values):
        values[SENT, FORWARD, LINK, ..., OF_COPIES[0]] *= 3.0
        values[:, FORWARD, LINK, 1, :, OF_COPIES[0]] *= 1e6

    (finding,) = world.step(drifted).findings
    assert finding.worker == Worker(LINK, 1) and not finding.strikes and "two ends of the link" in str(finding)


def test_what_both_ends_report_alike_still_strikes_beside_it(world):
    def drifted(values):
        values[SENT, FORWARD, LINK, ..., OF_COPIES[0]] *= 3.0
        values[:, FORWARD, LINK, 1, :, NAMES.index("energy")] *= 1e6

    (finding,) = world.step(drifted).findings
    assert finding.strikes
