import numpy as np
import pytest

from deepspeed_sentinel.evidence.renewal import LEAD, PERIOD, READY, STALE, Renewal
from deepspeed_sentinel.mesh import Mesh

OFFSETS = np.array([0, 5, 77, 200, 2**61 + 3])


def test_every_projection_is_learnt_before_it_is_used_and_none_serves_for_ever():
    renewal = Renewal(OFFSETS)
    began, learnt_ahead = np.zeros(5, int), np.zeros(5, int)
    clean = np.random.default_rng(0).random((4 * PERIOD, 5)) < 0.8
    for missed in range(STALE, len(clean)):
        clean[missed] |= ~clean[missed - STALE + 1 : missed].any(0)
    for step in range(4 * PERIOD):
        epoch, overlapping = renewal.epoch_X, renewal.overlapping_X
        if clean[:step].sum(0).min() >= READY:
            assert renewal.ready_X.all(), step
        renewed, stale = renewal.learn(clean[step])
        learnt_ahead = np.where(overlapping, learnt_ahead + clean[step], 0)
        assert not stale.any() and (renewal.epoch_X == epoch + renewed).all()
        assert (learnt_ahead[renewed] == LEAD).all()
        assert (step - began <= PERIOD + 2 * LEAD).all()
        began[renewed], learnt_ahead[renewed] = step, 0
    assert (renewal.epoch_X >= 3).all()


def test_pairs_of_a_mesh_renew_at_steps_of_their_own():
    renewal = Renewal.of(Mesh(6, 8))
    steps = []
    for step in range(PERIOD):
        renewed, _ = renewal.learn(np.ones((2, 6, 8), bool))
        assert (renewal.new_X == renewed).all()
        steps += [step] * np.count_nonzero(renewed)
    assert len(steps) == 96 == len(set(steps))


@pytest.mark.parametrize("before", [0, 30, PERIOD - LEAD + 10])
def test_what_was_not_learnt_from_for_long_starts_anew(before):
    renewal = Renewal(0)
    for _ in range(before):
        renewal.learn(True)
    epoch = renewal.epoch_X
    for missed in range(1, STALE + 1):
        renewed, stale = renewal.learn(False)
        assert not renewed and stale == (missed == STALE)
    assert renewal.epoch_X == epoch + 1 and not renewal.ready_X and not renewal.overlapping_X
    for learnt in range(READY):
        assert not renewal.ready_X, learnt
        renewal.learn(True)
    assert renewal.ready_X


def test_forgetting_takes_another_projection():
    renewal = Renewal(OFFSETS)
    for _ in range(10):
        renewal.learn(np.ones(5, bool))
    renewal.forget()
    assert not renewal.ready_X.any() and (renewal.epoch_X == 1).all()


def test_pairs_that_are_parted_start_anew_and_the_others_go_on():
    renewal = Renewal(OFFSETS)
    for _ in range(10):
        renewal.learn(np.ones(5, bool))
    parted = np.array([True, False, False, True, False])
    renewal.forget(parted)
    assert (renewal.new_X == parted).all() and (renewal.epoch_X == parted).all() and (renewal.ready_X == ~parted).all()
    renewal.learn(np.ones(5, bool))
    assert not renewal.new_X.any()
