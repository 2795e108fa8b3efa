"""What fences learn while somebody tampers for long: neither nothing at all nor the tampering."""

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.mesh import BACKWARD, FORWARD
from integration_tests.variants import some

ENERGY = NAMES.index("energy")


def louder(values, stage, column, factor=20.0):
    values[:, FORWARD, stage, column, :, ENERGY] *= factor


def test_a_pair_of_replicas_keeps_its_fences_however_long_one_is_bad():
    world = World(replicas=2, probation_steps=200)
    world.warm_up(64)
    reach = world.judge.fences.reach.copy()
    for _ in range(100):
        assert world.step(lambda values: louder(values, 1, 1)).excluded.tolist() == [False, True]
    np.testing.assert_array_equal(world.judge.fences.reach, reach)


def test_where_every_column_has_a_bad_worker_observing_goes_on_seeing_them():
    world = World(stages=5, action="observe", strikes=20)

    def all_columns(values):
        for column, stage in enumerate((1, 2, 3)):
            louder(values, stage, column)

    world.warm_up(64)
    for _ in range(100):
        assert world.step(all_columns).alarms.any(axis=(0, 1, 3)).all()
    assert not np.isnan(world.judge.fences.reach[ENERGY]).any()
    assert world.judge.record.convicted.sum() == 3


INSIDE = [(4, 1, False), (8, 1, True), (3, 4, False), (2, 3, False), (8, 1, False), (4, 1, True)]


@pytest.mark.parametrize(("replicas", "bad", "breaks_the_next"), some(INSIDE, INSIDE[:4]))
def test_who_stays_just_inside_its_fence_cannot_carry_it_along(replicas, bad, breaks_the_next):
    """Some of four micro-batches at nine tenths of the fence as it stands; the honest stages behind may go far out.

    All four of one replica of three are more than a quarter of all messages: they move the quartiles.
    """
    world = World(stages=5, replicas=replicas)
    world.warm_up(64)
    fences = world.judge.fences
    place = (ENERGY, FORWARD, 1)
    first = fences.reach[place]

    def shifted(values):
        high = fences.bounds(FORWARD, 1, ENERGY)[1] - fences.reach[place]
        shift = high + 0.9 * fences.reach[place]
        centre = np.median(np.log(values[1, FORWARD, 1, :, :, ENERGY]))
        values[:, FORWARD, 1, 0, :bad, ENERGY] = np.exp(centre + fences.usual.level[(*place, 0)] + shift)
        if breaks_the_next:
            for behind in (values[:, FORWARD, 2:, 0, 0], values[:, BACKWARD, :, 0, 0]):
                behind[..., ENERGY] *= np.exp(2.5 * shift)

    for _ in range(64):
        verdict = world.step(shifted)
        assert not verdict.convicted.any()
    assert fences.reach[place] < 2.5 * first
