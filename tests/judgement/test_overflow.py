"""fp16 with dynamic loss scaling: honest overflow is nobody's fault, and no excuse for anything else."""

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.table import NAMES, RECEIVED, SENT
from deepspeed_sentinel.judgement.overflow import Overflow
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker

NON_FINITE, ENERGY, MAX_ABS = (NAMES.index(name) for name in ("non_finite", "energy", "max_abs"))
NEAR, FAR = 10.0, 1e6  # the largest magnitudes of made-up evidence are about 1


def world_of(stages=5, replicas=4, **changes):
    world = World(stages, replicas, **changes)
    world.warm_up()
    return world


def non_finite(*starts, micro_batches=slice(None)):
    """(stage, column) where gradients become non-finite, and stay so on their way."""

    def change(values):
        for stage, column in starts:
            values[:, BACKWARD, :stage, column, micro_batches, NON_FINITE] = 3

    return change


def strikers(verdict):
    return {finding.worker for finding in verdict.findings if finding.strikes}


def test_bad_workers_of_different_stages_are_no_majority():
    """Far from the limit both are struck; near it the columns are left out, and the others are judged and go on."""
    world = world_of()
    for _ in range(3):
        verdict = world.step(non_finite((1, 0), (3, 1)), overflow_limit=FAR)
        assert verdict.excluded.tolist() == [True, True, False, False]
    assert set(verdict.newly_convicted) == {Worker(1, 0), Worker(3, 1)}
    world = world_of()
    for _ in range(5):
        verdict = world.step(non_finite((1, 0), (3, 1)), overflow_limit=NEAR)
        assert verdict.excluded.tolist() == [True, True, False, False] and not verdict.skip
        assert len(verdict.findings) == 2 and not strikers(verdict)
        assert all("loss scaling may explain it: no strike" in str(finding) for finding in verdict.findings)


def test_one_message_that_overflows_does_not_shield_the_others():
    def tampered(values):
        non_finite((2, 0), micro_batches=0)(values)
        values[:, BACKWARD, 1, 0, 1:, ENERGY] *= 1e6

    world = world_of()
    for _ in range(3):
        verdict = world.step(tampered, overflow_limit=NEAR)
        (finding,) = verdict.findings
        assert finding.worker == Worker(2, 0) and finding.striking == (1, 2, 3) and finding.statistic == "energy"
    assert verdict.newly_convicted == (Worker(2, 0),)


def test_a_forward_message_does_not_overflow_by_loss_scaling():
    def tampered(values):
        values[:, FORWARD, 1:, 0, :, NON_FINITE] = 1
        values[:, BACKWARD, :, 0, :, NON_FINITE] = 1

    assert strikers(world_of().step(tampered, overflow_limit=NEAR)) == {Worker(1, 0)}


@pytest.mark.parametrize("ends", [SENT, RECEIVED, slice(None)])
def test_one_columns_magnitudes_are_no_excuse(ends):
    """However large one worker says that they are, or makes them."""

    def tampered(values):
        non_finite((2, 0), micro_batches=0)(values)
        values[ends, BACKWARD, 1:3, 0, 1:, MAX_ABS] = 1e6

    world = world_of()
    for _ in range(3):
        verdict = world.step(tampered, overflow_limit=FAR)
        assert not any(finding.overflow for finding in verdict.findings if finding.worker == Worker(2, 0))


def test_a_report_of_one_end_is_no_excuse_where_the_others_are_near():
    """The median column is near the limit; the one that overflows is near it only by its receiver's word."""
    mesh = Mesh(4, 3)
    max_abs = np.full((2, 2, mesh.links, 3, 2), 1.0)
    max_abs[:, BACKWARD, :, 0] = 1e-6
    mask = np.zeros(max_abs.shape[1:], bool)
    mask[BACKWARD, :2, 0, 0] = True
    served = np.tile(np.arange(3), (4, 1))
    assert not Overflow(mesh).step(max_abs, np.stack([mask, mask]), served, limit=10.0).overflow.any()
    max_abs[RECEIVED, BACKWARD, :, 0] = 1.0
    assert not Overflow(mesh).step(max_abs, np.stack([mask, mask]), served, limit=10.0).overflow.any()
    max_abs[SENT, BACKWARD, :, 0] = 1.0
    explained = Overflow(mesh).step(max_abs, np.stack([mask, mask]), served, limit=10.0).overflow
    assert np.argwhere(explained).tolist() == [[BACKWARD, 1, 0, 0]], "where it starts"


@pytest.mark.parametrize(("columns", "shared"), [(range(2), False), (range(3), True), (range(4), True)])
def test_more_than_half_of_a_stages_replicas_leave_it_to_the_loss_scaler(columns, shared):
    world = world_of()
    verdict = world.step(non_finite(*((3, column) for column in columns)), overflow_limit=NEAR)
    assert verdict.excluded.any() != shared and bool(verdict.findings) != shared
    assert not strikers(verdict)
    assert verdict.skip == verdict.overflow == shared, "what is not judged must not be stepped by"
    assert not world.step(non_finite(*((3, column) for column in columns)), overflow_limit=NEAR).halt


def test_in_a_step_left_to_the_scaler_the_others_are_judged():
    def tampered(values):
        non_finite((3, 0), (3, 1), (3, 2))(values)
        values[:, BACKWARD, 1, 3, :, ENERGY] *= 1e6

    verdict = world_of().step(tampered, overflow_limit=NEAR)
    assert strikers(verdict) == {Worker(2, 3)} and verdict.excluded.tolist() == [False, False, False, True]


def test_a_replica_that_serves_most_columns_is_one_replica():
    served = np.tile(np.arange(4), (5, 1))
    served[3] = [0, 0, 0, 1]
    verdict = world_of().step(non_finite((3, 0), (3, 1), (3, 2)), overflow_limit=NEAR, served=served)
    assert verdict.excluded.tolist() == [True, True, True, False]


def test_all_columns_out_by_overflow_bring_the_scale_down_and_never_halt():
    """It starts in another stage in each column, so no majority says that it is the scale."""
    world = world_of(max_skipped_steps=2)
    for _ in range(5):
        verdict = world.step(non_finite((1, 0), (2, 1), (3, 2), (3, 3)), overflow_limit=NEAR)
        assert verdict.skip and verdict.overflow and not verdict.halt and not strikers(verdict)
    for step in range(5):  # the first has new suspects and the third convicts them, which is something new
        verdict = world.step(non_finite((1, 0), (2, 1), (3, 2), (3, 3)), overflow_limit=FAR)
        assert verdict.skip and not verdict.overflow and bool(verdict.halt) == (step == 4)


def test_the_first_steps_search_the_scale_before_any_gradient_was_finite():
    world = World(stages=4, replicas=3)
    everywhere = non_finite(*((3, column) for column in range(3)))
    for power in range(8):
        verdict = world.step(everywhere, overflow_limit=1e-6 * 2**power)
        assert not verdict.findings and not verdict.excluded.any()
    for _ in range(25):
        world.step(overflow_limit=FAR)
    verdict = world.step(everywhere, overflow_limit=FAR)
    assert verdict.excluded.all(), "what was finite in the step before decides"


def test_what_was_near_the_limit_is_remembered_with_the_state():
    one, other = world_of(stages=4, replicas=3), World(stages=4, replicas=3)
    one.step(overflow_limit=FAR)
    other.judge.load_state_dict(one.judge.state_dict())
    everywhere = non_finite(*((3, column) for column in range(3)))
    assert other.step(everywhere, overflow_limit=FAR).excluded.all()


@pytest.mark.parametrize(
    ("replicas", "senders", "receivers"), [(3, [0], [1]), (8, [0, 1, 2], [3, 4]), (3, [], [1]), (3, [], [0, 1, 2])]
)
def test_one_ends_word_is_no_overflow_that_most_share(replicas, senders, receivers):
    """Minorities of two stages, or all of one: their columns are in dispute, and what is behind is judged."""
    world = world_of(replicas=replicas)

    def lie(values):
        values[SENT, BACKWARD, 1, senders, :, NON_FINITE] = 1
        values[RECEIVED, BACKWARD, 1, receivers, :, NON_FINITE] = 1
        values[:, BACKWARD, 0, receivers, :, ENERGY] *= 1e12

    verdict = world.step(lie, overflow_limit=NEAR)
    told = sorted({*senders, *receivers})
    assert np.flatnonzero(verdict.excluded).tolist() == told and [one.column for one in verdict.disputed] == told


def test_where_most_overflow_disputes_stand():
    world = world_of()

    def change(values):
        non_finite((3, 0), (3, 1), (3, 2))(values)
        values[RECEIVED, BACKWARD, 0, 3, :, MAX_ABS] *= 100
        values[RECEIVED, BACKWARD, 1, 0, :, NON_FINITE] = 0

    verdict = world.step(change, overflow_limit=NEAR)
    assert [(one.link, one.column) for one in verdict.disputed] == [(0, 3), (1, 0)]
    assert verdict.excluded.tolist() == [True, False, False, True] and verdict.skip and verdict.overflow


def test_who_observes_skips_nothing():
    world = world_of(action="observe")
    assert not world.step(non_finite((3, 0), (3, 1), (3, 2)), overflow_limit=NEAR).skip
