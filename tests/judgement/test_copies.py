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
