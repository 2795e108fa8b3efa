"""Micro-batches to which the last stage gives no gradient: nobody's fault, and nothing may be made of them."""

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.table import NAMES, OF_PAIR, RECEIVED, SENT, ZEROS, Rows
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Worker

MAX_ABS, NON_FINITE = NAMES.index("max_abs"), NAMES.index("non_finite")


def zero(columns, micro_batch=1, links=slice(None), but=()):
    """Gradients of a micro-batch are exactly zero over these links, but not in what these stages send."""

    def change(values):
        for column in columns:
            kept = values.copy()
            values[:, BACKWARD, links, column, micro_batch] = 0.0
            values[:, BACKWARD, links, column, micro_batch, OF_PAIR] = -87.0
            for stage in but:
                values[:, BACKWARD, stage - 1, column, micro_batch] = kept[:, BACKWARD, stage - 1, column, micro_batch]

    return change


def warmed(stages=5, replicas=3, change=None):
    world = World(stages, replicas)
    for _ in range(30):
        world.step(change)
    return world


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_micro_batch_without_labels_is_nobodys_fault_and_costs_nothing(replicas):
    world = warmed(replicas=replicas)
    for _ in range(30):
        verdict = world.step(zero([0]))
        assert not verdict.findings and not verdict.disputed and not verdict.excluded.any()
        assert (verdict.scores[BACKWARD, :, 0, 1] == 0).all()


@pytest.mark.parametrize("columns", [[1], [0, 1]])
def test_who_makes_a_gradient_of_nothing_is_named(columns):
    world = warmed()
    world.step(zero([0, 1, 2]))  # an honest one leaves it as it is

    def change(values):
        zero(columns)(values)
        zero([1], but=[2])(values)
        values[:, BACKWARD, 1, 1, 1, MAX_ABS] = 3.0

    verdict = world.step(change)
    (finding,) = verdict.findings
    assert finding.worker == Worker(2, 1) and finding.statistic == "from_nothing" and not finding.rests_on_pair
    assert finding.direction == BACKWARD and finding.link == 1 and finding.micro_batches == (1,)
    assert "zero" in str(finding)
    assert verdict.excluded.tolist() == [False, True, False]


def test_what_is_made_of_nothing_is_named_where_it_is_made():
    world = warmed()
    world.step(zero([0, 1, 2]))

    def change(values):
        zero([1], links=slice(2, None))(values)  # stage 2 made something, and stage 1 hands it on

    (finding,) = world.step(change).findings
    assert finding.worker == Worker(2, 1)


def test_zeros_that_do_not_come_from_the_last_stage_are_an_attack():
    world = warmed()
    (finding,) = world.step(zero([1], links=slice(0, 2))).findings
    assert finding.worker == Worker(2, 1) and finding.statistic != "from_nothing"


def test_zeros_forward_are_an_attack():
    world = warmed()

    def change(values):
        values[:, FORWARD, 1, 1, 1, MAX_ABS] = 0.0

    (finding,) = world.step(change).findings
    assert finding.worker == Worker(1, 1)


def test_a_stage_that_adds_a_gradient_of_its_own_may():
    """A router's balancing loss has a gradient whatever the labels are."""
    world = warmed(change=zero([0], but=[2, 1]))
    for _ in range(5):
        assert not world.step(zero([1], but=[2, 1])).findings
    world = warmed()
    assert not world.step(zero([0, 1], but=[2, 1])).findings, "most of those that were given nothing"
    assert not world.step(zero([2], but=[2, 1])).findings, "so it is known to"


def test_nan_is_seen_in_what_carries_nothing():
    world = warmed()

    def change(values):
        zero([1])(values)
        values[:, BACKWARD, 1, 1, 1, NON_FINITE] = 4.0

    (finding,) = world.step(change).findings
    assert finding.worker == Worker(2, 1) and finding.statistic in ("non_finite", "from_nothing")


def test_what_carries_nothing_is_not_learnt_from():
    world, other = warmed(), warmed()
    before = world.judge.fences.iqr.copy()
    for _ in range(20):
        world.step(zero([0, 1, 2]))
        other.step()
    assert np.isfinite(world.judge.fences.iqr[~Rows(1).of_pair]).all()
    assert (world.judge.fences.iqr[MAX_ABS] < 2 * before[MAX_ABS]).all()


def test_what_is_known_of_the_stages_survives_a_checkpoint():
    world, resumed = warmed(change=zero([0], but=[2, 1])), World(5, 3)
    resumed.judge.load_state_dict(world.judge.state_dict())
    resumed.time = world.time
    assert not resumed.step(zero([1], but=[2, 1])).findings


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("replicas", [2, 3])
def test_one_partners_word_makes_nothing_of_zeros(digests, replicas):
    """Stage 2 hands zeros on, stage 1 says that it got something."""
    world = warmed(replicas=replicas)
    world.step(zero(range(replicas)))

    def lie(values):
        zero([0])(values)
        values[RECEIVED, BACKWARD, 1, 0, 1, MAX_ABS] = 0.01

    def marks(of_tensors):
        of_tensors[:, BACKWARD, :, 0, 1] = ZEROS

    for _ in range(4):
        verdict = world.step(lie, digests=marks if digests else None)
        (dispute,) = verdict.disputed
        assert (dispute.sender, dispute.receiver, dispute.about) == (Worker(2, 0), Worker(1, 0), None)
        assert not verdict.findings and np.flatnonzero(verdict.excluded).tolist() == [0]


def test_in_the_warm_up_too_one_end_that_says_zero_is_a_dispute():
    def lie(values):
        values[SENT, BACKWARD, 1, 0, 1, MAX_ABS] = 0.0

    verdict = World(5, 3).step(lie)
    assert [one.link for one in verdict.disputed] == [1] and not verdict.findings


def test_where_the_ends_differ_the_checksum_of_zeros_tells_that_it_was_zero():
    """The one that receives from the last stage says that it got something, so that what follows would be judged."""
    world = warmed()

    def lie(values):
        zero([0])(values)
        values[RECEIVED, BACKWARD, -1, 0, 1, MAX_ABS] = 0.01

    def marks(of_tensors):
        of_tensors[:, BACKWARD, :, 0, 1] = ZEROS

    verdict = world.step(lie, digests=marks)
    assert not verdict.alarms.any() and [one.link for one in verdict.disputed] == [3]


@pytest.mark.parametrize("replicas", [3, 8])
def test_garbage_of_nothing_is_not_believed_the_first_time_and_a_strike_once_the_others_keep_zeros(replicas):
    world = warmed(replicas=replicas)

    def garbage(values):
        zero([0])(values)
        zero([0], but=[2])(values)
        values[:, BACKWARD, 1, 0, 1] = 0.0
        values[:, BACKWARD, :2, 0, 1, MAX_ABS] = 1e20

    for _ in range(4):
        verdict = world.step(garbage)
        (finding,) = verdict.findings
        assert finding.worker == Worker(2, 0) and not finding.strikes and "it is not known" in str(finding)
        assert np.flatnonzero(verdict.excluded).tolist() == [0]
    world.step(zero(range(replicas)))
    (finding,) = world.step(garbage).findings
    assert finding.worker == Worker(2, 0) and finding.strikes


def test_most_of_all_replicas_decide_also_where_few_are_asked_at_a_time():
    world = warmed()
    assert world.step(zero([1], but=[2, 1])).excluded.tolist() == [False, True, False]
    assert not world.step(zero([2], but=[2, 1])).excluded.any(), "the second of three"
    assert not world.step(zero([0], but=[2, 1])).findings


def test_what_was_decided_is_taken_back_and_strikes_nobody_any_more():
    world = warmed(change=zero([0], but=[2]))
    assert not world.step(zero([1], but=[2])).findings
    world.step(zero([0, 1, 2]))  # most keep zeros now
    verdict = world.step(zero([1], but=[2]))
    (finding,) = verdict.findings
    assert not finding.strikes and verdict.excluded.tolist() == [False, True, False]


def test_a_replica_that_serves_several_columns_decides_for_one():
    world = warmed()
    served = np.tile(np.arange(3), (5, 1))
    served[2] = [0, 0, 2]
    assert world.step(zero([0, 1], but=[2]), served=served).excluded.tolist() == [True, True, False]
