"""Micro-batches to which the last stage gives no gradient: nobody's fault, and nothing may be made of them."""

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.table import NAMES, OF_PAIR, Rows
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
