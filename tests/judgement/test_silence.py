"""A neighbour that gives another number of tokens must not hide the stage between."""

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.table import NAMES, OF_PAIR
from deepspeed_sentinel.judgement.silence import AGAIN
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Worker

ENERGY, MAX_ABS, NON_FINITE = (NAMES.index(name) for name in ("energy", "max_abs", "non_finite"))


def silent(columns, direction=FORWARD, link=1, micro_batches=slice(None)):
    def change(values):
        for column in columns:
            values[:, direction, link, column, micro_batches, OF_PAIR] = np.nan

    return change


@pytest.mark.parametrize(
    ("direction", "link", "about", "ends"), [(FORWARD, 1, 1, (0, 2)), (FORWARD, 2, 2, (1, 3)), (BACKWARD, 0, 1, (2, 0))]
)
def test_neighbours_that_have_nothing_to_say_are_in_dispute(direction, link, about, ends):
    world = World()
    world.warm_up()
    for micro_batches in (2, slice(None)):
        verdict = world.step(silent([1], direction, link, micro_batches))
        (dispute,) = verdict.disputed
        assert dispute.about == Worker(about, 1)
        assert (dispute.sender.stage, dispute.receiver.stage) == ends
        assert verdict.excluded.tolist() == [False, True, False]
        assert not verdict.findings and not verdict.convicted.any()


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_stage_that_changes_the_number_of_tokens_has_never_had_any(replicas):
    world = World(replicas=replicas)
    for _ in range(40):
        verdict = world.step(silent([0], micro_batches=1))
        assert not verdict.disputed and not verdict.excluded.any()


def test_what_most_columns_have_no_longer_is_a_turn_of_the_model():
    world = World()
    world.warm_up()
    assert not world.step(silent([0, 2])).disputed
    assert not world.step(silent([1])).disputed


def test_messages_that_cannot_have_any_are_no_dispute():
    world = World()
    world.warm_up()

    def without_part(values):
        values[:, :, :, 1, 2] = np.nan

    def broken(values):
        silent([1])(values)
        values[:, FORWARD, 0, 1, :, NON_FINITE] = 1

    def zeros(values):
        silent([1])(values)
        values[:, FORWARD, 1, 1, :, [ENERGY, MAX_ABS]] = 0

    for change in (without_part, broken, zeros):
        assert not world.step(change).disputed


@pytest.mark.parametrize(("replicas", "columns"), [(3, [0, 1]), (5, [0, 1, 2, 3]), (8, [0, 1, 2, 3, 4, 5])])
def test_minorities_of_both_neighbours_silence_no_stage_for_good(replicas, columns):
    world = World(5, replicas)
    world.warm_up()
    verdict = world.step(silent(columns, link=2))
    assert [one.column for one in verdict.disputed] == columns
    assert [one.column for one in world.step(silent([0], link=2)).disputed] == [0]


def test_a_turn_of_the_model_is_taken_back_once_the_stage_is_heard_again():
    world = World(5, 3)
    world.warm_up()
    assert not world.step(silent([0, 1, 2], link=2)).disputed
    for _ in range(AGAIN // 2):
        assert not world.step().disputed
    assert not world.step(silent([0, 1], link=2)).disputed, "too soon, and it is counted anew"
    for _ in range(AGAIN):
        assert not world.step().disputed
    assert [one.column for one in world.step(silent([0], link=2)).disputed] == [0]
    assert not world.step(silent([0, 1, 2], link=2)).disputed, "another turn"


def test_a_turn_survives_a_checkpoint():
    world, resumed = World(5, 3), World(5, 3)
    world.warm_up()
    world.step(silent([0, 1, 2], link=2))
    resumed.judge.load_state_dict(world.judge.state_dict())
    resumed.time = world.time
    assert not resumed.step(silent([0], link=2)).disputed
