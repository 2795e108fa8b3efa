import math

import numpy as np
import pytest

from deepspeed_sentinel.evidence import exact

mpmath = pytest.importorskip("mpmath")  # torch depends on it
GENERATOR = np.random.default_rng(0)
SPREAD = np.exp(GENERATOR.uniform(-740, 709, 2000))
NEAR_ONE = 1 + GENERATOR.uniform(-0.3, 0.5, 2000) * 10.0 ** GENERATOR.uniform(-12, 0, 2000)
SHARES = np.concatenate([GENERATOR.uniform(0, 1, 2000), np.exp(GENERATOR.uniform(-40, 0, 2000)), [0.0, 0.25, 0.5, 1.0]])
NEAR_SHARES = 1 - np.exp(GENERATOR.uniform(-13.8, 0, 2000))


@pytest.mark.parametrize(
    ("ours", "true", "values"),
    [
        (exact.log, mpmath.log, np.concatenate([SPREAD, NEAR_ONE, [1.0, 5e-324, 1.7e308, np.finfo(np.float32).tiny]])),
        (exact.arctanh, mpmath.atanh, np.concatenate([NEAR_SHARES, -NEAR_SHARES, [0.0]])),
        (exact.arcsin, mpmath.asin, np.concatenate([SHARES, 1 - SHARES])),
    ],
)
def test_values_are_those_of_the_function(ours, true, values):
    with mpmath.workprec(120):
        right = [true(mpmath.mpf(float(value))) for value in values]
        errors = [abs(mpmath.mpf(float(a)) - b) / max(1, abs(b)) for a, b in zip(ours(values), right, strict=True)]
        assert float(max(errors)) < 3e-16


def test_logarithm_at_the_ends_of_its_domain():
    found = exact.log(np.array([0.0, -0.0, -1.0, -np.inf, np.inf, np.nan, 1.0]))
    np.testing.assert_array_equal(found, [-np.inf, -np.inf, np.nan, np.nan, np.inf, np.nan, 0.0])


@pytest.mark.parametrize("function", [exact.log, exact.arctanh, exact.arcsin])
def test_any_shape_layout_and_missing_values(function):
    values = np.random.default_rng(1).uniform(0.1, 0.9, (3, 40000))
    whole = function(values)
    assert np.array_equal(function(values.T).T, whole), "a value's result must not depend on where it stands"
    assert np.array_equal(function(values[:, ::7]), whole[:, ::7])
    assert np.isnan(function(np.array([np.nan]))).all() and function(np.zeros((2, 0))).shape == (2, 0)
    assert function(np.array(0.5)).shape == ()


def test_totals_do_not_depend_on_the_layout():
    values = np.random.default_rng(2).standard_normal((5, 6, 33)) * 10.0 ** np.arange(33)
    turned = np.ascontiguousarray(values.transpose(2, 0, 1)).transpose(1, 2, 0)
    assert np.array_equal(exact.total(values), exact.total(turned))
    np.testing.assert_allclose(exact.total(values), values.sum(-1), rtol=1e-12)
    assert np.array_equal(exact.total(np.zeros((4, 0))), np.zeros(4))
    assert exact.total(np.array([1.0, np.inf])) == np.inf and np.isnan(exact.total(np.array([1.0, np.nan])))
    assert np.array_equal(exact.total(np.array([[1.0], [2.0]])), [1.0, 2.0])


def test_rounded_constants_lie_far_from_ties():
    """libm's variants differ by 1e-16: a value within that of a tie would be rounded up here and down there."""
    from statistics import NormalDist

    from deepspeed_sentinel.judgement import cusum

    raw = [NormalDist().inv_cdf(n / (n + 1)) for n in range(1, 1024)] + [NormalDist().cdf(k) for k in cusum._KNOTS]
    constants = [*cusum._OUTERMOST[1:], *cusum._PROBABILITIES]
    assert len(raw) == len(constants) and np.abs(np.subtract(raw, constants)).max() <= 0.5e-9
    for value in raw:
        scaled = value * 1e9
        assert abs(abs(scaled - math.floor(scaled)) - 0.5) > 1e-5, value
