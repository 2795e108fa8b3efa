import time
from fractions import Fraction
from math import comb

import numpy as np
import pytest

from deepspeed_sentinel.telemetry.rates import FEWEST, TAIL, above_peers, binomial_tail


@pytest.mark.parametrize(
    ("least", "draws", "share"),
    [(3, 3, 0.1), (5, 40, 0.05), (90, 140, 2 / 7), (40, 400, 0.09), (7, 7, 0.5), (1, 9, 0.01)],
)
def test_the_tail_is_exact(least, draws, share):
    p = Fraction(share)
    exact = float(sum(comb(draws, k) * p**k * (1 - p) ** (draws - k) for k in range(least, draws + 1)))
    (value,) = binomial_tail(np.array([least]), np.array([draws]), np.array([share]))
    assert value == pytest.approx(exact, rel=1e-9)


def test_the_tail_at_its_ends():
    least, draws = np.array([0, 5, 1, 4, 0]), np.array([0, 10, 10, 4, 3])
    np.testing.assert_array_equal(binomial_tail(least, draws, np.array([0.5, 0.6, 0.0, 1.0, 0.0])), [1, 1, 0, 1, 1])


def test_the_worked_example():
    above, chance, peers = above_peers(np.array([400, 90] + [10] * 6), np.full(8, 10_000))
    assert above.tolist() == [True, True] + [False] * 6
    assert chance[1] == pytest.approx(1.2e-19, rel=0.1) and peers[1] == pytest.approx(0.001)


def test_a_bad_minority_hides_nobody_however_bad_the_worst_is():
    steps = np.full(9, 5000)
    alarmed = np.array([5000, 300, 80, 60, 4, 5, 6, 3, 7])
    assert above_peers(alarmed, steps)[0].tolist() == [True] * 4 + [False] * 5


def test_few_alarms_are_none():
    alarmed, steps = np.zeros(4096, int), np.full(4096, 1000)
    alarmed[7] = FEWEST - 1
    assert not above_peers(alarmed, steps)[0].any()
    alarmed[7] = FEWEST  # 3 in 1,000 where 4,095,000 steps had none: a chance of 1e-10
    assert np.flatnonzero(above_peers(alarmed, steps)[0]).tolist() == [7]


def test_what_all_devices_do_is_no_report():
    assert not above_peers(np.full(16, 700), np.full(16, 1000))[0].any()


def test_honest_differences_below_the_margin_are_no_report_over_however_many_steps():
    rng = np.random.default_rng(0)
    rate = np.linspace(0.02, 0.035, 32)
    assert not above_peers(rng.binomial(1_000_000, rate), np.full(32, 1_000_000))[0].any()


def test_devices_that_were_hardly_seen_are_not_accused_and_hide_nobody():
    alarmed, steps = np.array([2, 3, 30, 400, 35, 28, 33, 29]), np.array([2, 10, 3000, 3000, 3000, 3000, 3000, 3000])
    assert np.flatnonzero(above_peers(alarmed, steps)[0]).tolist() == [3]


def test_the_level_holds_with_few_and_with_many_alarms():
    """Devices that are all alike: nobody in 1,000 meshes, where a test at the level may find one in 10,000."""
    rng = np.random.default_rng(1)
    for devices, mean in ((4, 3.0), (16, 1.0), (64, 1.0), (64, 50.0)):
        for _ in range(250):
            assert not above_peers(rng.poisson(mean, devices), np.full(devices, 10_000))[0].any()


def test_the_order_of_devices_does_not_matter():
    rng = np.random.default_rng(2)
    alarmed, steps = rng.poisson(20, 24), rng.integers(500, 5000, 24)
    alarmed[[3, 11]] = 300, 900
    above, chance, _ = above_peers(alarmed, steps)
    shuffled = rng.permutation(24)
    np.testing.assert_array_equal(above_peers(alarmed[shuffled], steps[shuffled])[0], above[shuffled])
    assert (chance[above] < TAIL / 24).all() and above[[3, 11]].all()


@pytest.mark.parametrize("devices", [0, 1])
def test_without_peers_nobody_is_reported(devices):
    above, chance, peers = above_peers(np.full(devices, 50), np.full(devices, 60))
    assert not above.any() and (chance == 1).all() and np.isnan(peers).all()


def test_two_devices_take_a_great_difference():
    assert not above_peers(np.array([20, 0]), np.array([100, 100]))[0].any()
    assert above_peers(np.array([40, 0]), np.array([100, 100]))[0].tolist() == [True, False]


def test_among_ever_so_many_steps_it_is_quick_and_never_below_the_chance():
    begun = time.process_time()
    for bits in (24, 30, 40, 53):
        steps = 1 << bits
        alarmed = np.array([int(steps * 0.2 * (1 + 1e-7)), int(steps * 0.1)])
        assert not above_peers(alarmed, np.full(2, steps))[0].any()
        assert above_peers(np.array([steps // 2, steps // 8]), np.full(2, steps))[0].tolist() == [True, False]
    assert not above_peers(np.full(2048, 1 << 52), np.full(2048, 1 << 53))[0].any(), "sums beyond 2^63"
    assert time.process_time() - begun < 20


def test_where_the_sum_becomes_a_bound_the_bound_lies_above_it():
    draws = np.full(40, (1 << 24) - 1)
    for share in (1e-6, 0.01, 0.4):
        least = (draws * share + np.linspace(1, 8, 40) * np.sqrt(draws * share)).astype(np.int64)
        exact, bound = (binomial_tail(least, draws + more, np.full(40, share)) for more in (0, 2))
        assert (bound >= exact).all() and (np.diff(bound) <= 0).all() and bound[-1] < TAIL
