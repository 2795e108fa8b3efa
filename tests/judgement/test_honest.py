"""Honest differences: what all replicas do, and what comes of a column's data, is no attack."""

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.mesh import FORWARD, Worker

ENERGY, L2, MEAN_ABS, GAIN, STEP, NON_FINITE = (
    NAMES.index(name) for name in ("energy", "l2_rel", "mean_abs", "transfer_gain", "transfer_step", "non_finite")
)
GAIN_SPREAD = 0.01  # of synthetic.py
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]


def everybody_louder(values):
    """Another kind of data, or a learning rate five times as high: all statistics of messages rise fivefold."""
    values[..., [MEAN_ABS, L2, ENERGY]] *= 5.0
    values[..., GAIN] += 20 * GAIN_SPREAD


def other_data(column, shift=5.0):
    """What the column's first stage is given is of another kind, and so is all that follows."""

    def change(values):
        values[:, :, :, column, :, L2] *= 3.0
        values[:, :, :, column, :, MEAN_ABS] *= 2.0
        values[:, :, :, column, :, GAIN] += shift * GAIN_SPREAD

    return change


def other_gain(column, shift=5.0, link=1):
    """What the worker of stage 1 makes of its input changes, and nothing else does."""

    def change(values):
        values[:, FORWARD, link, column, :, GAIN] += shift * GAIN_SPREAD

    return change


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_what_all_replicas_do_in_the_same_step_excludes_and_convicts_nobody(replicas):
    world = World(replicas=replicas)
    world.warm_up()
    verdicts = [world.step(everybody_louder) for _ in range(40)]
    assert not any(verdict.excluded.any() or verdict.skip for verdict in verdicts)
    assert not verdicts[-1].convicted.any()
    assert not any(verdict.alarms.any() for verdict in verdicts[20:]), "it was not learnt"


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_spike_of_one_step_in_all_replicas_is_forgotten(replicas):
    world = World(replicas=replicas)
    world.warm_up()
    for _ in range(4):
        assert not world.step(everybody_louder).excluded.any()
        assert not any(world.step().excluded.any() for _ in range(5))
    assert not world.step().convicted.any()


def test_one_replica_alone_is_told_of_and_never_struck():
    world = World(replicas=1)
    world.warm_up()

    def shrunk(values):
        values[:, FORWARD, 1, 0, :, ENERGY] *= 1e-6

    verdict = world.step(shrunk)
    (finding,) = verdict.findings
    assert finding.worker == Worker(1, 0) and finding.score > 1 and not finding.strikes
    assert "nothing to compare with" in str(finding)
    assert not verdict.excluded.any() and not verdict.skip


@pytest.mark.parametrize("replicas", [1, 2])
def test_what_is_not_finite_still_counts_without_a_majority(replicas):
    world = World(replicas=replicas)
    world.warm_up()

    def broken(values):
        values[:, FORWARD, 1, 0, :, NON_FINITE] = 3

    for strike in range(3):
        verdict = world.step(broken)
        assert verdict.excluded.tolist() == [True, False][:replicas]
        assert bool(verdict.newly_convicted) == (strike == 2)
    assert verdict.newly_convicted == (Worker(1, 0),)


@pytest.mark.parametrize("bad", [0, 1])
def test_of_two_the_one_that_left_its_past_is_convicted_and_stays_out(bad):
    world = World(replicas=2)
    world.warm_up()

    def louder(values):
        values[:, FORWARD, 1, bad, :, ENERGY] *= 50.0

    verdicts = [world.step(louder) for _ in range(30)]
    assert {finding.worker for verdict in verdicts for finding in verdict.findings} == {Worker(1, bad)}
    assert all(verdict.excluded.tolist() == [bad == 0, bad == 1] for verdict in verdicts)
    assert np.argwhere(verdicts[-1].convicted).tolist() == [[1, bad]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_a_column_that_crosses_to_other_data_is_not_lost(replicas, seed):
    world = World(replicas=replicas, seed=seed)
    world.warm_up(40)
    verdicts = [world.step(other_data(replicas - 1)) for _ in range(60)]
    assert not verdicts[-1].convicted.any()
    assert sum(verdict.excluded.sum() for verdict in verdicts) <= 0.05 * 60 * replicas


def test_the_same_without_new_content_convicts():
    """Where the first stage sends what it always sent, a pair that changes so much is the worker's doing."""
    world = World(replicas=5)
    world.warm_up(40)
    for _ in range(30):
        verdict = world.step(other_gain(2))
    assert np.argwhere(verdict.convicted).tolist() == [[1, 2]]


@pytest.mark.parametrize("seed", SEEDS)
def test_lasting_differences_that_wander_are_no_attack(seed):
    """Each replica has its own kind of data from the start, and training makes something else of it with time."""
    world = World(replicas=3, seed=seed)

    def kinds(values):
        for column, factor in enumerate((0.6, 1.0, 1.8)):
            values[:, :, :, column, :, L2] *= factor
            drift = (column - 1) * (2.0 + 0.05 * world.time)
            values[:, :, :, column, :, GAIN] += drift * GAIN_SPREAD

    verdicts = [world.step(kinds) for _ in range(120)]
    assert not verdicts[-1].convicted.any()
    assert sum(verdict.excluded.sum() for verdict in verdicts) <= 0.05 * 120 * 3


def message_alone(column, factor, content):
    def change(values):
        if content:
            values[:, FORWARD, 0, column, :, L2] *= 3.0
        values[:, FORWARD, 1, column, :, ENERGY] *= factor

    return change


def test_what_stands_out_in_messages_alone_is_content_where_content_is_new():
    world = World(replicas=3)
    world.warm_up(40)
    verdicts = [world.step(message_alone(2, 8.0, content=True)) for _ in range(40)]
    assert not verdicts[-1].convicted.any()
    told = [finding for verdict in verdicts for finding in verdict.findings if finding.worker == Worker(1, 2)]
    assert all("content" in str(finding) and not finding.strikes for finding in told)
    assert not any(verdict.excluded.any() for verdict in verdicts[8:]), "the column stayed out"


@pytest.mark.parametrize(("factor", "content"), [(8.0, False), (1e9, True)])
def test_without_new_content_or_beyond_all_content_it_is_an_attack(factor, content):
    world = World(replicas=3)
    world.warm_up(40)
    for _ in range(10):
        verdict = world.step(message_alone(2, factor, content))
    assert verdict.excluded.tolist() == [False, False, True]
    assert np.argwhere(verdict.convicted).tolist() == [[1, 2]]


def test_what_lasts_from_the_start_is_taken_off_whole():
    def other(values):
        values[:, FORWARD, 1, 2, :, GAIN] += 0.03

    world = World(replicas=5)
    for _ in range(200):
        world.step(other)
    level = world.judge.fences.usual.level[GAIN, FORWARD, 1]
    assert level[2] - np.median(level) == pytest.approx(0.03, rel=0.15)


def test_who_drifts_slowly_does_not_take_what_is_usual_along():
    """No step differs much from the one before."""
    world = World(replicas=5)
    world.warm_up(64)
    start, convicted = world.time, []
    for _ in range(60):
        verdict = world.step(other_gain(3, shift=0.15 * (world.time - start)))
        convicted += verdict.newly_convicted
    assert convicted == [Worker(1, 3)]


def test_a_liar_beside_the_first_stage_does_not_make_its_own_content_new():
    """What the first stage sent is what it says itself, within the room that reports have."""
    world = World(replicas=3)
    world.warm_up(40)

    def lie(values):
        values[1, FORWARD, 0, 2, :, L2] += 0.9 * world.judge.fences.iqr[L2, FORWARD, 0]

    for _ in range(20):
        verdict = world.step(lie)
    assert not verdict.disputed and not world.judge.content.unlike.any()


def test_state_goes_on_where_it_was():
    world, again = World(replicas=3), World(replicas=3)
    for one in (world, again):
        one.warm_up(40)
        for _ in range(10):
            one.step(other_data(1))
    again.judge = World(replicas=3).judge
    again.judge.load_state_dict(world.judge.state_dict())
    for _ in range(10):
        assert world.step(other_data(1)).digest() == again.step(other_data(1)).digest()
    assert again.judge.fences.usual.level[GAIN, FORWARD, 1, 1] != 0


@pytest.mark.parametrize("replicas", [3, 8])
def test_a_neighbour_that_bends_the_pair_a_little_brings_content_before_the_audit(replicas):
    """Below its fence, so nothing but content's excuse falls by it: what then strikes rests on the neighbour's word."""
    world = World(5, replicas)
    world.warm_up(64)

    def content(values):
        values[:, FORWARD, 0, 1, :, [ENERGY, L2]] *= 1.35

    for _ in range(8):
        world.step(content)
    assert world.judge.content.unlike[1]
    reach = {row: float(world.judge.fences.reach[row, FORWARD, 1]) for row in (ENERGY, GAIN)}

    def bent(values):
        content(values)
        values[:, FORWARD, 1:, 1, :, ENERGY] *= np.exp(2.6 * reach[ENERGY])
        values[:, FORWARD, 1, 1, :, GAIN] = 0.1 + 1.4 * reach[GAIN] + 0.7 * GAIN_SPREAD

    finding = next(one for one in world.step(bent).findings if one.worker == Worker(1, 1))
    assert finding.strikes and finding.statistic == "energy"
    assert finding.rests_on_pair and finding.but_for_pair and finding.telling


@pytest.mark.parametrize(("tampered", "micro_batches"), [([0], 4), ([0, 1, 2], 8)])
@pytest.mark.parametrize("seed", SEEDS)
def test_of_two_who_tampers_with_the_lesser_part_of_its_messages_is_found_and_nobody_behind_it(
    tampered, micro_batches, seed
):
    world = World(stages=4, replicas=2, seed=seed, micro_batches=micro_batches)
    world.warm_up(64)

    def louder(values):
        values[:, FORWARD, 1:, 1, tampered, ENERGY] *= 1e6
        values[:, 1, :, 1, tampered, ENERGY] *= 1e6

    verdicts = [world.step(louder) for _ in range(20)]
    assert {finding.worker for verdict in verdicts for finding in verdict.findings} == {Worker(1, 1)}
    assert all(verdict.excluded.tolist() == [False, True] for verdict in verdicts)
