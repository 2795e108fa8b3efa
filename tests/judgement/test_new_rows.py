"""Statistics that were not there before: nothing that is unknown switches an alarm off."""

import numpy as np
import pytest
from synthetic import World, settings

from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import NAMES, OF_PAIR
from deepspeed_sentinel.judgement.judge import Judge
from deepspeed_sentinel.mesh import BACKWARD, FORWARD

ENERGY, NON_FINITE = NAMES.index("energy"), NAMES.index("non_finite")
MEMORY = [NAMES.index(name) for name in ("cross_moment", "prediction_correlation", "prediction_slope")]
REPORTED = 14


def seen_late(change=None, steps=45, replicas=4, after=12):
    """Who is left out, bool [after, R], once a second part of messages appears that the warm-up had none of."""
    world = World(stages=5, replicas=replicas)
    world.judge = Judge(world.mesh, settings(), 2)
    excluded = []
    for step in range(steps + after):
        first, second = world.statistics(), world.statistics()
        if step < steps:
            second[..., :REPORTED] = np.nan
        elif change:
            change(second)
        statistics = np.concatenate([first, second], axis=-1)
        digests = np.zeros((*statistics.shape[:5], 1), np.int64)
        excluded.append(world.judge.step(Evidence(world.mesh, step, statistics, digests)).excluded)
    return np.array(excluded)[steps:]


@pytest.mark.parametrize(("row", "value"), [(ENERGY, 1e30), (NON_FINITE, 5.0)])
def test_what_appears_late_is_judged_from_its_first_step_on(row, value):
    def change(values):
        values[:, FORWARD, 1, 0, :, row] = value

    excluded = seen_late(change)
    assert excluded[:, 0].all()
    assert not excluded[:, 1:].any()


def test_what_appears_late_and_is_honest_leaves_nobody_out():
    assert np.count_nonzero(seen_late(after=30)) == 0


def test_who_tampers_with_it_from_its_second_step_on_is_seen_at_once():
    steps = []

    def change(values):
        steps.append(None)
        if len(steps) > 1:
            values[:, FORWARD, 1, 0, :, ENERGY] *= 1e3

    assert seen_late(change)[1:, 0].all()


@pytest.mark.parametrize(("row", "value"), [(ENERGY, 1e30), (NON_FINITE, 5.0)])
def test_the_step_in_which_a_memory_is_there_for_the_first_time_is_judged(row, value):
    world = World(stages=5, replicas=4, warmup_steps=3)
    for step in range(8):

        def change(values, step=step):
            if step < 4:
                values[..., MEMORY] = np.nan
            if step >= 4:
                values[:, FORWARD, 1, 0, :, row] = value

        verdict = world.step(change)
    assert verdict.excluded.tolist() == [True, False, False, False]


def test_one_pair_that_was_never_heard_of_blinds_nobody():
    """Stage 2 changes the number of tokens; two neighbours give numbers about one of its messages."""
    pairs = np.flatnonzero(OF_PAIR[:REPORTED])

    def mute(values, but=None):
        kept = values[:, FORWARD, 2, but, 0][..., pairs].copy() if but is not None else None
        values[:, FORWARD, 2][..., pairs] = np.nan
        values[:, BACKWARD, 1][..., pairs] = np.nan
        if but is not None:
            for end in range(2):
                values[end, FORWARD, 2, but, 0, pairs] = kept[end]

    world = World(stages=5, replicas=4)
    for _ in range(40):
        world.step(mute)

    def spoken_of(values):
        mute(values, but=3)
        values[:, FORWARD, 2, 0, :, ENERGY] = 1e30

    assert world.step(spoken_of).excluded[0]
