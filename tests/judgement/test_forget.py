"""Another machine in the place of a convicted worker: nothing that was held against the one before is held on."""

import pytest
from synthetic import CULPRIT, World, tamper

from deepspeed_sentinel.judgement.judge import Judge
from deepspeed_sentinel.mesh import FORWARD, Worker


@pytest.fixture
def convicted():
    """A world whose judge goes on from a checkpoint in which one worker is convicted."""
    world = World()
    world.warm_up()
    for _ in range(4):
        world.step(tamper)
    assert world.judge.record.convicted[CULPRIT] and world.judge.record.convicted.sum() == 1
    state = world.judge.state_dict()
    world.judge = Judge(world.mesh, world.judge.settings)
    world.judge.load_state_dict(state)
    return world


def test_an_honest_machine_in_its_place_is_neither_convicted_nor_suspected_nor_on_probation(convicted):
    record = convicted.judge.record
    convicted.judge.forget(CULPRIT)
    assert not record.on_probation.any() and not record.strikes.any() and not record.suspects.any()
    for verdict in convicted.warm_up(40):
        assert not (verdict.convicted.any() or verdict.suspects.any() or verdict.released or verdict.excluded.any())


def test_it_can_be_convicted_like_any_other(convicted):
    convicted.judge.forget(CULPRIT)
    convicted.warm_up(5)
    assert [convicted.step(tamper).newly_convicted for _ in range(3)] == [(), (), (CULPRIT,)]


def test_what_others_had_unsettled_with_the_one_before_convicts_it_of_nothing(convicted):
    """A conviction hides such pairs; without it they would be as many contradictions as convict at once."""
    kept, forgotten = convicted.judge.unsettled._left, convicted.judge.forget
    kept[1, 0, :, CULPRIT.replica] = kept[1, 1, CULPRIT.replica] = kept[2, 1, CULPRIT.replica] = 9
    kept[0, 1, 0, CULPRIT.replica] = kept[0, 1, CULPRIT.replica, 0] = 9
    kept[1, 1, 0, 1] = 9
    forgotten(CULPRIT)
    assert convicted.judge.doubts.apart == ((Worker(1, 0), Worker(2, 1)),), "what others have with each other stays"
    assert not convicted.step().convicted.any()


def test_nobody_is_isolated_for_what_the_one_before_did(convicted):
    isolation = convicted.judge.isolation
    of_culprit, of_another = (-1, (3 + 2, 6 + 1)), (-1, (3 + 0, 6 + 1))
    isolation._events = {of_culprit: 9, of_another: 9}
    isolation.isolated[CULPRIT] = True
    convicted.judge.forget(CULPRIT)
    assert list(isolation._events) == [of_another]
    assert not isolation.isolated.any()


def test_what_stood_out_of_the_one_before_is_not_what_is_usual_of_it(convicted):
    standing, mask = convicted.judge.standing, convicted.judge.record.convicted.copy()
    assert standing._steps[FORWARD, 1, CULPRIT.replica] >= 3
    convicted.judge.forget(CULPRIT)
    assert not standing.lasting(mask)[0].any()


def test_what_was_added_up_against_the_one_before_is_gone(convicted):
    sums = convicted.judge.cusum._sums
    sums[...] = 1.0
    convicted.judge.forget(CULPRIT)
    left = convicted.judge.cusum._sums
    assert not left[..., FORWARD, 1, CULPRIT.replica].any()
    assert left[..., FORWARD, 2, :].all() and left[..., FORWARD, 1, 0].all()
