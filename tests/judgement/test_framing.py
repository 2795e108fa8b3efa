"""A worker that chooses when to tamper, so that blame falls on an honest one before it."""

from copy import deepcopy

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.judgement.blame import Blame
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Worker
from integration_tests.variants import some

ENERGY = NAMES.index("energy")
STEPS = 60
PLACES = (FORWARD, 2, 1), (BACKWARD, 2, 0), (FORWARD, 3, 2), (BACKWARD, 0, 1)


def stand_out(world, values, reach):
    """Five honest messages in a hundred stand out, up to twice the fence after the warm-up: fences learn as much."""
    chosen = world.generator.random(values.shape[1:5]) < 0.05
    values[..., ENERGY] *= np.exp(reach * world.generator.uniform(0.3, 1.9, chosen.shape) * chosen)


def verdict_if_honest(world, values):
    """Its scores are more than the bad worker can know, which has last step's fences and centres only."""
    judge = deepcopy(world.judge)
    return judge.step(Evidence(world.mesh, world.time, values, np.zeros((*values.shape[:5], 1), np.int64)))


def struck(verdict):
    return {finding.worker for finding in verdict.findings if finding.strikes}


def ordered(scores):
    return np.concatenate([scores[FORWARD], scores[BACKWARD][::-1]])


@pytest.mark.parametrize("lowest", some((0.3, 0.4, 0.5, 0.6, 0.7), (0.5,)))
@pytest.mark.parametrize(("direction", "link", "column"), some(PLACES, PLACES[:2]))
def test_tampering_where_what_entered_is_conspicuous_gets_nobody_else_convicted(direction, link, column, lowest):
    """The bad worker acts on micro-batches alone that an honest one before it has sent with a score in a window."""
    world = World(stages=5, replicas=3, micro_batches=8)
    world.warm_up(40)
    bad = Worker(world.mesh.sender_stage(direction, link), column)
    position = link if direction == FORWARD else 2 * world.mesh.links - 1 - link
    reach = world.judge.fences.reach[ENERGY][..., None, None].copy()
    acted = 0
    for _ in range(STEPS):

        def tampered(values):
            nonlocal acted, otherwise
            stand_out(world, values, reach)
            otherwise = verdict_if_honest(world, values)
            before = ordered(otherwise.scores)[:position, column]
            chosen = ((before >= lowest) & (before < 0.95)).any(0)
            acted += chosen.any()
            values[:, direction, link, column, chosen, ENERGY] *= 1e4

        otherwise = None
        verdict = world.step(tampered)
        assert struck(verdict) <= struck(otherwise) | {bad}
    assert acted >= 2, "else this shows nothing"


@pytest.mark.parametrize("micro_batches", [[0], [0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("served_anew", [False, True])
def test_who_stays_inside_the_fences_and_breaks_the_next_gets_nobody_convicted(micro_batches, served_anew):
    """The honest worker behind goes far outside its fences, on these micro-batches."""
    world = World(replicas=4)
    world.warm_up()
    for step in range(20):
        served = np.tile(np.arange(4), (4, 1))
        if served_anew:
            served[1] = np.roll(served[1], step)
        column = int(np.flatnonzero(served[1] == 2)[0])

        def tampered(values, column=column):
            typical = np.median(values[0, FORWARD, 1, :, :, ENERGY])
            reach = world.judge.fences.reach[ENERGY, FORWARD, 1]
            values[:, FORWARD, 1, column, micro_batches, ENERGY] = typical * np.exp(0.95 * reach)
            values[:, FORWARD, 2, column, micro_batches, ENERGY] *= 50
            values[:, BACKWARD, :, column, micro_batches, ENERGY] *= 50

        verdict = world.step(tampered, served=served)
        assert np.flatnonzero(verdict.excluded).tolist() == [column]
        assert verdict.findings and not any(finding.strikes for finding in verdict.findings)
        assert all("no strike" in str(finding) for finding in verdict.findings)


def test_conspicuous_work_of_its_own_excuses_nobody():
    world = World()
    world.warm_up()
    for _ in range(3):

        def tampered(values):
            typical = np.median(values[0, FORWARD, 1, :, :, ENERGY])
            values[:, FORWARD, 1, 2, :, ENERGY] = typical * np.exp(0.8 * world.judge.fences.reach[ENERGY, FORWARD, 1])
            values[:, BACKWARD, 0, 2, :, ENERGY] *= 50

        verdict = world.step(tampered)
    assert verdict.newly_convicted == (Worker(1, 2),)


def test_an_alarm_in_a_column_leaves_no_strike_behind_it_in_that_column():
    """A worker in alarm on one micro-batch may have spoilt the others as well, just inside its fences."""

    def tampered(values):
        values[:, FORWARD, 1, 2, 0, ENERGY] *= 50
        values[:, FORWARD, 2, 2, 1, ENERGY] *= 50

    world = World()
    world.warm_up()
    verdict = world.step(tampered)
    assert [(finding.worker, finding.strikes) for finding in verdict.findings] == [
        (Worker(1, 2), True),
        (Worker(2, 2), False),
    ]
    assert world.judge.record.strikes.sum() == 1


def messages(links=2, micro_batches=4):
    return np.zeros((2, links, 1, micro_batches))


def test_work_is_conspicuous_on_average_over_all_that_nothing_went_wrong_before():
    scores, alarms = messages(), messages() > 0
    scores[FORWARD, 0, 0] = [0.9, 0.9, 0.9, 0.1]
    scores[FORWARD, 1, 0, 0] = 3.0
    alarms[FORWARD, 1, 0, 0] = True
    none = np.zeros_like(alarms)
    blame = Blame.of(alarms, none, scores, none, none)
    assert np.argwhere(blame.named).tolist() == [[FORWARD, 0, 0, 0]] and not blame.strikes.any()
    scores[FORWARD, 0, 0] = [0.9, 0.1, 0.1, 0.1]
    blame = Blame.of(alarms, none, scores, none, none)
    assert np.argwhere(blame.named).tolist() == [[FORWARD, 1, 0, 0]] and not blame.strikes.any()
    scores[FORWARD, 0, 0] = [0.1, 0.9, 0.1, 0.1]
    blame = Blame.of(alarms, none, scores, none, none)
    assert np.argwhere(blame.strikes).tolist() == [[FORWARD, 1, 0, 0]]


def test_nothing_conspicuous_explains_what_is_certain():
    """Tensors that should have passed through as they were, for one."""
    scores, alarms = messages(), messages() > 0
    scores[FORWARD, 0, 0, 0] = 0.9
    scores[FORWARD, 1, 0, 0] = 3.0
    alarms[FORWARD, 1, 0, 0] = True
    none = np.zeros_like(alarms)
    assert not Blame.of(alarms, none, scores, none, none).strikes.any()
    assert (Blame.of(alarms, none, scores, none, certain=alarms).strikes == alarms).all()


def test_what_follows_an_event_makes_nobody_conspicuous():
    """The messages of link 1 are huge where link 0 is in alarm; the alarm of another micro-batch stays where it is."""
    scores, alarms = messages(links=3), messages(links=3) > 0
    scores[FORWARD, 0, 0, 0], alarms[FORWARD, 0, 0, 0] = 9.0, True
    scores[FORWARD, 1, 0, 0] = 1e9
    scores[FORWARD, 2, 0, 1], alarms[FORWARD, 2, 0, 1] = 4.0, True
    none = np.zeros_like(alarms)
    named = Blame.of(alarms, none, scores, none, none).named
    assert np.argwhere(named).tolist() == [[FORWARD, 0, 0, 0], [FORWARD, 2, 0, 1]]
