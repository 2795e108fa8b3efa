"""The centre that all are measured from: fewer than half of a stage are bad, and they are never its side."""

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.evidence.table import NAMES, SENT
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Worker

ENERGY = NAMES.index("energy")
MUCH = np.exp(2.0)


def behind(values, column, link, factor):
    """What a bad worker of stage ``link`` and all behind it send in a column."""
    values[:, FORWARD, link:, column, :, ENERGY] *= factor
    values[:, BACKWARD, :, column, :, ENERGY] *= factor


def struck(verdict):
    return {finding.worker for finding in verdict.findings if finding.strikes}


@pytest.mark.parametrize("only_lies", [False, True])
@pytest.mark.parametrize(
    ("replicas", "first", "second"), [(3, [0], [1]), (5, [0, 1], [2, 3]), (8, [0, 1, 2], [3, 4, 5])]
)
def test_the_bad_of_one_stage_are_not_the_norm_where_those_before_spoilt_the_other_columns(
    replicas, first, second, only_lies
):
    world = World(stages=5, replicas=replicas)
    world.warm_up(40)

    def tampered(values):
        for column in first:
            if only_lies:
                values[SENT, FORWARD, 1, column, :, ENERGY] *= 50.0
            else:
                behind(values, column, 1, 50.0)
        for column in second:
            values[:, FORWARD, 2, column, :, ENERGY] *= MUCH

    for _ in range(4):
        verdict = world.step(tampered)
        named = {Worker(2, column) for column in second} | (set() if only_lies else {Worker(1, c) for c in first})
        assert struck(verdict) == named
        assert np.flatnonzero(~verdict.excluded).tolist() == [c for c in range(replicas) if c not in first + second]


def test_columns_of_convicted_workers_that_behave_still_speak_for_the_stage_behind():
    world = World(stages=5, replicas=5)
    world.warm_up(40)
    for _ in range(3):
        verdict = world.step(lambda values: [behind(values, column, 1, 50.0) for column in (0, 1)])
    assert np.argwhere(verdict.convicted).tolist() == [[1, 0], [1, 1]]
    for _ in range(3):
        verdict = world.step(lambda values: [behind(values, column, 2, MUCH) for column in (2, 3)])
        assert struck(verdict) == {Worker(2, 2), Worker(2, 3)}
        assert verdict.excluded.tolist() == [False, False, True, True, False]


def test_the_recent_centre_follows_training_where_it_stands_in_for_long():
    """Two of five columns are spoilt in all steps, while what all send grows by a fence and a half."""
    world = World(stages=5, replicas=5, action="observe", strikes=1000)
    world.warm_up(40)
    reach, start = world.judge.fences.reach[ENERGY, FORWARD, 2], world.time

    def growing(values):
        values[..., ENERGY] *= np.exp(1.5 * reach * (world.time - start) / 100)
        for column in (0, 1):
            behind(values, column, 1, 1e4)

    for _ in range(100):
        verdict = world.step(growing)
        assert verdict.suspected.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(("replicas", "steps"), [(3, 1), (3, 3), (5, 1)])
def test_the_only_column_left_is_held_against_what_training_has_turned_to(replicas, steps):
    """Else it would be in alarm while all others are spoilt; no step would count, and nothing change any more."""
    world = World(stages=5, replicas=replicas)
    world.warm_up(40)
    turned = np.exp(1.3 * world.judge.fences.reach[ENERGY, FORWARD, 2])

    def turn(values):
        values[..., ENERGY] *= turned

    for _ in range(steps):
        assert not world.step(turn).excluded.any()
    first = replicas // 2

    def spoilt(values):
        turn(values)
        for column in range(replicas - 1):
            behind(values, column, 1 if column < first else 2, 50.0)

    for _ in range(12):
        verdict = world.step(spoilt)
        assert not {worker for worker in struck(verdict) if worker.replica == replicas - 1}
        assert np.flatnonzero(~verdict.excluded).tolist() == [replicas - 1]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("wild", [0.5, 0.7])
@pytest.mark.parametrize("replicas", [3, 4])
def test_an_honest_spike_of_all_replicas_strikes_nobody(replicas, wild, seed):
    """For six steps all energies are twenty times as large, each message's by a factor of its own."""
    world = World(stages=5, replicas=replicas, seed=seed)
    world.warm_up(40)
    generator = np.random.default_rng(seed + 99)
    for _ in range(6):
        factors = np.exp(3.0 + wild * generator.standard_normal((replicas, 4)))

        def spike(values, factors=factors):
            values[:, FORWARD, 1:, :, :, ENERGY] *= factors

        verdict = world.step(spike)
        assert not struck(verdict)
    assert not verdict.convicted.any()


def test_what_is_not_finite_in_most_columns_of_a_link_is_no_turn_of_training():
    world = World(replicas=2)
    world.warm_up()

    def broken(values):
        values[:, BACKWARD, 0, :, :, NAMES.index("non_finite")] = 1  # of both columns, and one of them from before
        values[:, BACKWARD, 1, 1, :, NAMES.index("non_finite")] = 1

    verdict = world.step(broken)
    assert [1, 0] in [list(finding.worker) for finding in verdict.findings if finding.strikes]


def test_where_training_went_in_twin_steps_is_no_alarm_afterwards():
    """Half of the columns are spoilt in all steps, and most steps are twin steps, while what all send grows."""
    world = World(stages=5, replicas=8, conviction="proof")
    world.warm_up(40)
    reach, start = world.judge.fences.reach[ENERGY, FORWARD, 2], world.time
    bad = [(1, 0), (1, 1), (2, 2), (2, 3)]

    def training(values):
        values[..., ENERGY] *= np.exp(0.06 * reach * (world.time - start))

    def odd(digests):
        for link, column in bad:
            digests[:, FORWARD, link:, column] = digests[:, BACKWARD, :, column] = 1 + column

    def spoilt(values):
        training(values)
        for link, column in bad:
            behind(values, column, link, 50.0)

    def given_the_same(values):
        values[:] = values[:, :, :, :1]
        spoilt(values)

    stages, replicas = world.mesh.stages, world.mesh.replicas
    alike = np.ones((stages, replicas), np.int64)
    twins = Twins(0, np.ones(replicas, bool), alike, alike.astype(float), 0 * alike)
    for step in range(40):
        if step % 6:
            world.step(given_the_same, digests=odd, twins=twins)
        else:
            assert np.flatnonzero(~world.step(spoilt).excluded).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("replicas", [4, 6, 8])
def test_what_half_of_the_columns_do_is_no_turn_of_training(replicas):
    """Neighbours of a stage may lie about half of its columns, fewer than half of each; no step would count then."""
    world = World(stages=5, replicas=replicas, conviction="proof")
    world.warm_up(40)
    gain = NAMES.index("transfer_gain")
    shift = 2.6 * world.judge.fences.reach[gain, FORWARD, 2]

    def lied(values):
        values[:, FORWARD, 2, : replicas // 2, :, gain] += shift

    for _ in range(4):
        assert np.flatnonzero(~world.step(lied).excluded).tolist() == list(range(replicas // 2, replicas))


def test_nor_is_what_half_of_those_left_do_after_a_conviction():
    world = World(stages=5, replicas=5, conviction="proof")
    world.warm_up(40)
    gain = NAMES.index("transfer_gain")
    shift = 5.0 * world.judge.fences.reach[gain, FORWARD, 2]
    alike = np.ones((5, 5), np.int64)

    def odd(digests):
        digests[:, FORWARD, 2:, 4] = digests[:, BACKWARD, :, 4] = 9

    world.step(digests=odd, twins=Twins(0, np.ones(5, bool), alike, alike.astype(float), 0 * alike))
    assert np.argwhere(world.judge.record.convicted).tolist() == [[2, 4]]

    def lied(values):
        values[:, FORWARD, 2, :2, :, gain] += shift

    for _ in range(4):
        assert np.flatnonzero(~world.step(lied).excluded).tolist() == [2, 3, 4]


def test_no_twin_step_moves_what_others_are_measured_from_by_more_than_a_part_of_a_fence():
    """Those around a stage may lie about what it does, of whatever is right; so may a column whose data are its own."""
    world = World(stages=5, replicas=8, conviction="proof")
    world.warm_up(40)
    gain = NAMES.index("transfer_gain")
    reach = world.judge.fences.reach[gain, FORWARD, 2]
    alike = np.ones((5, 8), np.int64)

    def lied(values):
        values[:] = values[:, :, :, :1]
        values[:, FORWARD, 2, :, :, gain] += 3.0 * reach

    before = world.judge.fences.centre.state_dict()["centres"][gain, FORWARD, 2, 0]
    world.step(lied, twins=Twins(0, np.ones(8, bool), alike, alike.astype(float), 0 * alike))
    after = world.judge.fences.centre.state_dict()["centres"][gain, FORWARD, 2, 0]
    assert 0.1 * reach < after - before < 0.35 * reach
