"""Tensors that pass a stage unchanged: who stops passing them on is named, whoever computes from them is not."""

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.table import RECEIVED, SENT, ZEROS
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Worker
from integration_tests.variants import some

TENSORS, IDS = 3, 1


class Carrying(World):
    """Messages of a hidden state (0), position ids (1) and, forward only, a mask (2), which every stage passes on."""

    def step(self, alter=None, **more):
        def digests(marks):
            marks[:] = np.random.default_rng(self.time).integers(1, 1 << 60, marks.shape[1:])  # both ends alike
            for direction in (FORWARD, BACKWARD):
                first = 0 if direction == FORWARD else -1
                marks[:, direction, :, ..., 1:] = marks[:, direction, first, None, ..., 1:]
            marks[:, BACKWARD, ..., 2] = 0
            if alter:
                alter(marks)

        return super().step(digests=digests, tensors=TENSORS, **more)


def warmed(stages=4, replicas=3, **changes):
    world = Carrying(stages, replicas, **changes)
    assert not any(verdict.findings or verdict.disputed for verdict in world.warm_up())
    return world


def from_stage(stage, columns, tensor=IDS, direction=FORWARD, micro_batches=slice(None)):
    """What a stage sends, and all stages after it hand on, has another tensor."""

    def alter(marks):
        links = slice(stage, None) if direction == FORWARD else slice(None, stage)
        for column in columns:
            marks[:, direction, links, column, micro_batches, tensor] += 7

    return alter


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_who_alters_what_it_used_to_pass_on_is_named_and_nobody_behind_it(replicas, direction):
    world = warmed(5, replicas)
    culprit = Worker(2, replicas - 1)
    for count in range(1, 4):
        verdict = world.step(from_stage(2, [replicas - 1], direction=direction, micro_batches=[0, 2]))
        (finding,) = verdict.findings
        assert finding.worker == culprit and finding.direction == direction and finding.micro_batches == (0, 2)
        assert finding.statistic == "passed_on" and finding.value == 1 and not finding.rests_on_pair
        assert "always passed on unchanged" in str(finding)
        assert verdict.excluded.tolist() == [column == replicas - 1 for column in range(replicas)]
        assert verdict.newly_convicted == ((culprit,) if count == 3 else ())


def test_what_follows_in_the_sums_is_the_cascade():
    world = warmed()

    def odd_next_stage(values):
        values[:, FORWARD, 2, 1] *= 50

    (finding,) = world.step(from_stage(1, [1]), change=odd_next_stage).findings
    assert finding.worker == Worker(1, 1)


def test_both_tensors_are_counted():
    world = warmed()

    def both(marks):
        from_stage(1, [0])(marks)
        from_stage(1, [0], tensor=2)(marks)

    (finding,) = world.step(both).findings
    assert finding.value == 2


def test_what_most_columns_no_longer_do_was_no_rule():
    world = warmed()
    verdict = world.step(from_stage(1, [0, 2]))
    assert not verdict.findings and not verdict.excluded.any()
    assert not world.step(from_stage(1, [1])).findings, "forgotten"
    (finding,) = world.step(from_stage(2, [1])).findings
    assert finding.worker == Worker(2, 1), "of another stage it still holds"


def test_of_two_replicas_only_a_difference_of_one_counts():
    world = warmed(replicas=2)
    assert world.step(from_stage(1, [1])).findings
    assert not world.step(from_stage(2, [0, 1])).findings


def test_the_hidden_state_and_tensors_that_are_not_there_make_no_rule():
    world = warmed()
    verdict = world.step(from_stage(1, [1], tensor=0))
    assert not verdict.findings
    assert not world.step(from_stage(1, [1], tensor=2, direction=BACKWARD)).findings


def test_a_tensor_that_changed_in_the_warm_up_is_free_to_change():
    world = Carrying(4, 3)
    world.step(from_stage(1, [2], micro_batches=[1]))
    world.warm_up()
    assert not world.step(from_stage(1, [0])).findings


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_zeros_are_handed_on_too_but_no_gradient_that_is_zero_tells(direction):
    world = Carrying(4, 3)

    def zeros(marks):
        marks[:, direction, ..., IDS] = ZEROS

    def later(marks):
        zeros(marks)
        from_stage(1, [1], direction=direction)(marks)

    for _ in range(30):
        world.step(zeros)
    assert bool(world.step(later).findings) == (direction == FORWARD)
    assert not world.step().findings


def test_where_the_ends_of_a_link_disagree_nobody_is_named_by_it():
    world = warmed()

    def lie(marks):
        marks[RECEIVED, FORWARD, 1, 1, 2, IDS] += 1

    verdict = world.step(lie)
    assert not verdict.findings and [one.link for one in verdict.disputed] == [1]

    def lies_about_what_entered(marks):
        from_stage(1, [1])(marks)
        marks[SENT, FORWARD, 0, 1, :, IDS] += 7

    verdict = world.step(lies_about_what_entered)
    assert not verdict.findings and [one.link for one in verdict.disputed] == [0]


def test_of_two_equal_tensors_either_may_be_what_leaves():
    world = Carrying(4, 3)

    def equal(marks):
        marks[:, FORWARD, ..., 2] = marks[:, FORWARD, ..., 1]

    for _ in range(30):
        world.step(equal)
    assert not world.step(from_stage(0, [0], tensor=2)).findings, "no longer equal, but each passes"
    (finding,) = world.step(from_stage(1, [0], tensor=2)).findings
    assert finding.worker == Worker(1, 0)


def test_what_was_learnt_survives_a_checkpoint():
    world, resumed = warmed(), Carrying(4, 3)
    resumed.judge.load_state_dict(world.judge.state_dict())
    resumed.time = world.time
    (finding,) = resumed.step(from_stage(1, [1])).findings
    assert finding.worker == Worker(1, 1)


def test_another_number_of_tensors_is_learnt_anew():
    world = warmed()
    for _ in range(30):
        assert not World.step(world, tensors=1).findings
    for _ in range(30):
        assert not world.step().findings
    assert world.step(from_stage(1, [1])).findings


@pytest.mark.parametrize("replicas", [3, 8])
def test_one_worker_does_not_decide_which_of_two_equal_tensors_passes(replicas):
    """Two masks alike in the warm-up become unlike in one column, and its worker of stage 1 swaps them."""

    def alike(marks):
        marks[:, FORWARD, ..., 2] = marks[:, FORWARD, ..., 1]

    def unlike(column, swapped):
        def alter(marks):
            alike(marks)
            marks[:, FORWARD, :, column, :, 2] += 7
            if swapped:
                marks[:, FORWARD, 1:, column] = marks[:, FORWARD, 1:, column][..., [0, 2, 1]]

        return alter

    world = Carrying(5, replicas)
    for _ in range(30):
        world.step(alike)
    for _ in range(5):
        assert not world.step(unlike(0, swapped=True)).findings, "either may be what leaves"
    for column in range(1, replicas):
        for _ in range(3):
            verdict = world.step(unlike(column, swapped=False))
            assert not verdict.findings and not verdict.excluded.any()
    (finding,) = world.step(unlike(0, swapped=True)).findings
    assert finding.worker == Worker(1, 0) and finding.strikes, "now most have shown it"


def counting(world, replicas, grows):
    """A step of a count that is zero but for what some stages add in some messages, ``grows(stage, column)``."""

    def digests(marks):
        marks[:] = np.random.default_rng(world.time).integers(1, 1 << 60, marks.shape[1:])
        marks[:, FORWARD, ..., IDS], marks[:, BACKWARD, ..., IDS] = ZEROS, 0
        for stage in (1, 2):
            for column in range(replicas):
                marks[:, FORWARD, stage:, column, grows(stage, column), IDS] = 1 + world.time

    return world.step(digests=digests, tensors=2)


def never(stage, column):
    return np.zeros(4, bool)


@pytest.mark.parametrize("replicas", some((2, 3, 5), (2, 5)))
def test_a_count_that_was_zero_in_the_warm_up_may_grow_now_and_then(replicas):
    """Tokens that no expert had room for, say: each stage adds its own, and in the warm-up there were none."""
    world = World(4, replicas)
    for _ in range(30):
        counting(world, replicas, never)
    verdicts = [counting(world, replicas, lambda stage, column: world.generator.random(4) < 0.01) for _ in range(120)]
    assert not any(verdict.newly_convicted for verdict in verdicts)
    assert not any(verdict.findings for verdict in verdicts[60:]), "by then more than half of each stage have added"
    assert np.mean([verdict.excluded for verdict in verdicts]) < 0.05


@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_a_minority_that_alters_what_was_nothing_but_zeros_is_named_as_ever(replicas):
    world = World(4, replicas)
    for _ in range(30):
        counting(world, replicas, never)
    bad = range((replicas - 1) // 2 or 1)
    for count in range(1, 5):
        verdict = counting(world, replicas, lambda stage, column: np.full(4, stage == 1 and column in bad))
        assert {finding.worker for finding in verdict.findings} == {Worker(1, column) for column in bad}
        assert verdict.newly_convicted == (tuple(Worker(1, column) for column in bad) if count == 3 else ())
