import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.table import LEARNT, NAMES, OF_PAIR
from deepspeed_sentinel.judgement.cusum import Cusum
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker
from integration_tests.variants import some

GAIN = NAMES.index("transfer_gain")
PAIRS = 7


def weaker(direction, link, column, deviations):
    """Shifts one worker's gain by so many standard deviations of a message (see PAIR_VALUES)."""

    def change(values):
        values[:, direction, link, column, :, GAIN] += 0.01 * deviations

    return change


SHIFTS = [(FORWARD, 1, 1, 2.0), (BACKWARD, 1, 2, -2.0), (FORWARD, 1, 1, -2.0), (BACKWARD, 1, 2, 2.0)]


@pytest.mark.parametrize(("direction", "link", "stage", "deviations"), some(SHIFTS, SHIFTS[:2]))
def test_what_no_message_shows_adds_up(direction, link, stage, deviations):
    world = World(replicas=5)
    world.warm_up(60)
    verdicts = [world.step(weaker(direction, link, 2, deviations)) for _ in range(30)]
    assert not verdicts[0].findings, "a shift that is seen at once says nothing about adding up"
    convicted = [worker for verdict in verdicts for worker in verdict.newly_convicted]
    assert convicted == [Worker(stage, 2)]
    assert {finding.statistic for verdict in verdicts for finding in verdict.findings} == {"transfer_gain"}


def test_what_is_measured_in_a_projection_of_the_columns_own_does_not_add_up():
    """Correlations move with training, by more in one projection than in another: clean columns would be accused."""
    world = World(replicas=5)
    row = NAMES.index("cross_moment")

    def drifts(values):
        values[:, FORWARD, 1, 2, :, row] *= 1.15

    world.warm_up(60)
    verdicts = [world.step(drifts) for _ in range(60)]
    assert not any(verdict.findings for verdict in verdicts)


def test_a_worker_that_always_differs_is_compared_with_itself():
    world = World(replicas=5)
    verdicts = [world.step(weaker(FORWARD, 1, 2, 1.5)) for _ in range(150)]
    assert not any(verdict.newly_convicted for verdict in verdicts)


def test_what_all_replicas_share_is_no_deviation():
    world = World(replicas=5)
    world.warm_up(60)

    def drift(values):
        values[..., GAIN] += 0.01 * 1.5

    assert not any(world.step(drift).findings for _ in range(30))


def run(cusum, steps, generator, tail=None, changed=None):
    served = np.tile(np.arange(4), (4, 1))
    scores = []
    for step in range(steps):
        shape = (PAIRS, 2, 3, 4, 2)
        residuals = generator.standard_normal(shape) if tail is None else generator.standard_t(tail, shape)
        if changed:
            changed(residuals, step)
        counted, nobody = np.ones(shape[1:], bool), np.zeros((4, 4), bool)
        scores.append(cusum.step(residuals, counted, served, nobody, step, warming_up=step < 20))
    return np.array(scores)


@pytest.mark.parametrize("tail", [None, 3])
def test_honest_sums_stay_low_with_normal_and_with_heavy_tails(tail):
    scores = run(Cusum(Mesh(4, 4), seed=0), 400, np.random.default_rng(5), tail)
    assert (scores.max(axis=(1, 2, 3, 4)) > 1).mean() == 0


def test_a_single_outlier_does_not_fill_the_sum():
    def outlier(residuals, step):
        if step == 150:
            residuals[0, 0, 1, 2] = 1e6

    scores = run(Cusum(Mesh(4, 4), seed=0), 170, np.random.default_rng(6), changed=outlier)
    assert scores[150:, 0, 0, 1, 2].max() < 0.5


def test_columns_are_summed_by_the_worker_that_served_them():
    cusum, generator = Cusum(Mesh(4, 4), seed=0), np.random.default_rng(7)
    for step in range(120):
        served = np.tile(np.arange(4), (4, 1))
        served[1] = generator.permutation(4)
        residuals = generator.standard_normal((PAIRS, 2, 3, 4, 2))
        if step >= 80:
            residuals[3, 0, 1, np.flatnonzero(served[1] == 2)] += 3.0
        nobody = np.zeros((4, 4), bool)
        scores = cusum.step(residuals, np.ones((2, 3, 4, 2), bool), served, nobody, step, warming_up=step < 20)
    assert served[1, np.argmax(scores[3, 0, 1])] == 2 and scores[3, 0, 1].max() > 1
    assert (np.sort(scores[3, 0, 1])[:-1] < 1).all()


def test_where_another_projection_is_in_use_what_was_usual_is_no_longer():
    """A pair's statistics may lie elsewhere for good in another projection: that is no tampering that goes on."""
    learnt = np.flatnonzero(LEARNT[OF_PAIR])
    served, nobody = np.tile(np.arange(4), (4, 1)), np.zeros((4, 4), bool)

    def highest(told, row):
        cusum, generator, scores = Cusum(Mesh(4, 4), seed=0), np.random.default_rng(7), []
        for step in range(120):
            residuals = generator.standard_normal((PAIRS, 2, 3, 4, 2))
            if step >= 80:
                residuals[row, 0, 1, 2] += 3.0
            renewed = np.zeros((2, 4, 4), bool)
            renewed[:, 1, 2] = told and step == 80
            counted = np.ones((2, 3, 4, 2), bool)
            scores.append(cusum.step(residuals, counted, served, nobody, step, step < 20, renewed=renewed))
        return np.array(scores)[80:].max()

    assert len(learnt) == 3
    for row in learnt:
        assert highest(True, row) < 1 < highest(False, row)
    assert highest(True, 0) > 1, "the cosine is of a fresh projection in every step"


def test_state_round_trip():
    one, other = Cusum(Mesh(4, 4), seed=0), Cusum(Mesh(4, 4), seed=0)
    run(one, 40, np.random.default_rng(8))
    other.load_state_dict(one.state_dict())
    first, second = (run(each, 10, np.random.default_rng(9)) for each in (one, other))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("deviations", some((2.0, 3.0), (2.0,)))
def test_who_jumps_about_inside_its_fence_does_not_blunt_the_sums_of_others(deviations):
    """One replica of five does so in every third step; then another one's steady shift must still add up."""
    world = World(replicas=5)
    world.warm_up(40)

    def jumping(values):
        high = world.judge.fences.bounds(FORWARD, 1, GAIN)[1]
        if world.time % 3 == 0:
            values[:, FORWARD, 1, 0, :, GAIN] += 0.6 * high * (1 if world.time % 2 else -1)

    for _ in range(64):
        world.step(jumping)

    def both(values):
        jumping(values)
        weaker(FORWARD, 1, 1, deviations)(values)

    assert any(world.step(both).excluded[1] for _ in range(40))


@pytest.mark.parametrize(("wiring", "accused"), [("heal", False), ("shuffle", True)])
def test_what_is_usual_of_a_worker_is_learnt_anew_where_it_moves(wiring, accused):
    """Column 4 has data of another kind for good. Who comes to serve it is not to be blamed for that."""
    world = World(stages=4, replicas=5, wiring=wiring)

    def odd(values):
        values[:, FORWARD, 1, 4, :, NAMES.index("transfer_gain")] += 0.02

    for _ in range(60):
        world.step(odd)
    moved = np.tile(np.arange(5), (4, 1))
    moved[1] = [4, 1, 2, 3, 0]
    found = [finding.worker for _ in range(25) for finding in world.step(odd, served=moved).findings]
    assert bool(found) == accused
