"""A judge takes up what a judge of its kind can have written, and nothing else."""

from copy import deepcopy

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.table import BY_JUDGE, NAMES, RECEIVED, SENT
from deepspeed_sentinel.judgement.usual import FARTHEST
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, identity

ENERGY, GAIN = NAMES.index("energy"), NAMES.index("transfer_gain")


@pytest.fixture(scope="module")
def good():
    world = World(stages=4, replicas=5)
    world.warm_up(24)
    return world.judge.state_dict()


def changed(part, name, change):
    def apply(state):
        state[part][name] = change(state[part][name])

    return apply


def put(value):
    def change(array):
        array[(0,) * array.ndim] = value
        return array

    return change


SPOILT = {
    "a part is missing": lambda state: state.pop("content"),
    "an array is missing": lambda state: state["cusum"].pop("sums"),
    "an array too many": lambda state: state["record"].update(more=np.zeros(3)),
    "no mapping": lambda state: state.update(fences=3),
    "no array": lambda state: state["fences"].update(reach=None),
    "a window of another length": changed("fences", "samples", lambda samples: samples[..., :32, :]),
    "a statistic fewer": changed("fences", "reach", lambda reach: reach[:-1]),
    "an axis fewer": changed("fences", "reach", lambda reach: reach[0]),
    "another mesh": changed("record", "convicted", lambda convicted: convicted[:, :1]),
    "another type": changed("record", "convicted", lambda convicted: convicted.astype(np.float64)),
    "negative": changed("fences", "learnt", lambda learnt: learnt - 100),
    "no reach": changed("fences", "reach", lambda reach: reach * 0),
    "reach that is not finite": changed("fences", "reach", put(np.inf)),
    "reach that is huge": changed("fences", "reach", put(1e300)),
    "usual that is NaN": changed("fences", "usual_level", put(np.nan)),
    "usual that is huge": changed("fences", "usual_level", put(1e300)),
    "sums that are NaN": changed("cusum", "sums", put(np.nan)),
    "sums that are high": changed("cusum", "sums", put(1e6)),
    "usual deviation that is NaN": changed("cusum", "usual", put(np.nan)),
    "what stood out that is huge": changed("standing", "sums", put(1e59)),
    **{
        f"a counter that would wrap: {part} {name}": changed(part, name, put(np.iinfo(np.int64).max))
        for part, name in (("record", "position"), ("record", "refused_trials"), ("standing", "since"))
    },
    "content that is NaN": changed("content", "apart", put(np.nan)),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_what_no_judge_has_written_is_not_taken_up(good, spoil):
    state = deepcopy(good)
    spoil(state)
    fresh = World(stages=4, replicas=5).judge
    before = fresh.state_dict()
    assert fresh.problem(state)
    with pytest.raises(ValueError, match=r"the state (has|holds)"):
        fresh.load_state_dict(state)
    assert all(
        np.array_equal(before["fences"][name], array, equal_nan=True)
        for name, array in fresh.state_dict()["fences"].items()
    )


@pytest.mark.parametrize("steps", [0, 1, 24, 70])
@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_what_a_judge_has_written_is_taken_up_whenever_that_was(replicas, steps):
    world = World(stages=4, replicas=replicas)
    world.warm_up(steps)

    def attacked(values):
        values[:, FORWARD, 1, 0, :, ENERGY] = 3e38
        values[:, FORWARD, 2, 0, :, NAMES.index("prediction_slope")] = -3e38

    for _ in range(3):
        world.step(attacked)
    assert World(stages=4, replicas=replicas).judge.problem(world.judge.state_dict()) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3e38, 3e38, 0.0])
@pytest.mark.parametrize("stretch", [slice(None), slice(0, 1)])
def test_no_report_of_one_worker_makes_a_state_that_cannot_be_taken_up(value, stretch):
    """Else one liar would have every checkpoint refused, and with it all convictions forgotten."""
    world = World(stages=5, replicas=3)
    world.warm_up(24)
    row = np.arange(len(NAMES)) < np.argmax(BY_JUDGE)

    def lies(values):
        values[RECEIVED, FORWARD, 1, 0, stretch, row] = value
        values[SENT, FORWARD, 2, 0, stretch, row] = value
        values[RECEIVED, BACKWARD, 2, 0, stretch, row] = value
        values[SENT, BACKWARD, 1, 0, stretch, row] = value
        values[..., NAMES.index("non_finite")] = 0.0

    for _ in range(3):
        with np.errstate(over="ignore"):
            world.step(lies, overflow_limit=1e6)
    assert World(stages=5, replicas=3).judge.problem(world.judge.state_dict()) is None


def test_what_stood_out_and_is_taken_for_usual_stays_what_can_be_taken_up_again():
    fresh = World(stages=4, replicas=3, conviction="proof").judge
    everywhere = np.ones((2, 3, 3), bool)
    for _ in range(4):
        fresh.standing.step(np.full((*fresh.fences.usual.level.shape, 2), 9e38), everywhere, identity(fresh.mesh))
        fresh.fences.usual.adopt(everywhere, np.full(fresh.fences.usual.level.shape, 9e38))
    assert fresh.problem(fresh.state_dict()) is None and fresh.fences.usual.level.max() == FARTHEST


def louder(values):
    values[:, FORWARD, 1, 1, :, ENERGY] *= 1e6


def steadily(values):
    values[:, FORWARD, 1, 1, :, GAIN] += 0.03


@pytest.mark.parametrize(
    ("spoil", "attack"),
    [
        (lambda judge: judge.fences.usual.level.__setitem__((ENERGY, FORWARD, 1, 1), np.nan), louder),
        (lambda judge: judge.fences.reach.__setitem__((ENERGY, FORWARD, 1), np.nan), louder),
        (lambda judge: judge.cusum._sums.__setitem__((..., 1), np.nan), steadily),
        (lambda judge: judge.cusum._usual.__setitem__((..., 1), np.nan), steadily),
    ],
    ids=["usual", "reach", "sums", "usual deviation"],
)
def test_a_nan_that_a_fault_leaves_does_not_blind_for_ever(spoil, attack):
    world = World(stages=4, replicas=5)
    world.warm_up(40)
    spoil(world.judge)
    world.warm_up(20)
    assert any(world.step(attack).excluded[1] for _ in range(16))
