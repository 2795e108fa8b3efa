"""Logarithm, angle and sums that have the same bits on every host: numpy's and libm's have not.

``np.log`` and its like choose their code by what the CPU can do (AVX-512, AVX2, FMA), and the variants differ in the
last bit; so do those of libm. One last bit on one of two unlike hosts is sooner or later another verdict: the run ends.
What follows is made of operations alone that IEEE 754 rounds correctly (+ - * / sqrt) and of exact ones (the bits
of a number, comparisons). Each call into numpy rounds once: nothing is fused across calls.

    log x     = e ln 2 + log1p f,   x = 2^e (1 + f),   sqrt(1/2) <= 1 + f < sqrt(2)
    log1p f   = f - (f^2/2 - s (f^2/2 + R(s^2))),   s = f / (2 + f)
    arcsin x  = x + x P(x^2) / Q(x^2) up to 1/2,   pi/2 - 2 arcsin sqrt((1 - x) / 2) above

Polynomials and the two parts of ln 2 are those of fdlibm (Sun Microsystems 1993, e_log.c and e_asin.c). Errors against
mpmath are below 3e-16 of max(1, |result|). ``log`` takes 26 ns a value, ``np.log`` 7 (AMD EPYC 7003, one thread).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_ROOT_HALF_BITS = int(np.float64(0.7071067811865476).view(np.int64))
_MANTISSA = 52
_SMALLEST, _LARGEST = float(np.finfo(np.float64).tiny), float(np.finfo(np.float64).max)
_LIFTED, _LIFT = 54.0, 2.0**54  # powers of two that bring what is smaller to full precision
_LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
_ARCSIN_P = (
    1.66666666666666657415e-01,
    -3.25565818622400915405e-01,
    2.01212532134862925881e-01,
    -4.00555345006794114027e-02,
    7.91534994289814532176e-04,
    3.47933107596021167570e-05,
)
_ARCSIN_Q = (
    1.0,
    -2.40339491173441421878,
    2.02094576023350569471,
    -6.88283971605453293030e-01,
    7.70381505559019352791e-02,
)
_HALF_PI = 1.5707963267948966
# Some thirty passes over each block: as many values as stay in a core's own cache with what is made of them.
_BLOCK = 16384
_DECIMALS = 9


def log(values: np.ndarray) -> np.ndarray:
    """Natural logarithm, float64 of any shape; -inf of zero, NaN of what is negative or NaN."""
    return _of_each(_log, values)


def arctanh(values: np.ndarray) -> np.ndarray:
    """Inverse hyperbolic tangent of float64 values between -1 and 1; NaN stays NaN."""
    return _of_each(_arctanh, values)


def arcsin(values: np.ndarray) -> np.ndarray:
    """Angle of float64 values from 0 to 1; NaN stays NaN."""
    return _of_each(_arcsin, values)


def total(values: np.ndarray) -> np.ndarray:
    """Sum along the last axis, float64 [..., N] -> [...], always in one order: halves are added, then halves of those.

    The order in which ``sum`` adds depends on strides and on numpy's version.
    """
    if values.shape[-1] == 0:
        return np.zeros(values.shape[:-1])
    rows = values.reshape(-1, values.shape[-1])
    result = np.empty(len(rows))
    step = max(_BLOCK // values.shape[-1], 1)
    for start in range(0, len(rows), step):
        result[start : start + step] = _total(rows[start : start + step].T)
    return result.reshape(values.shape[:-1])


def count(marked: np.ndarray, axis: int = -1) -> np.ndarray:
    """How many of a bool array are true along an axis, the last one. Whole numbers add up in any order.

    As ``np.count_nonzero``, which of a small array takes ten times as long to look at what it was given.
    """
    return np.asarray(np.add.reduce(marked, axis=axis, dtype=np.intp))


def normal_quantile(probability: float) -> float:
    """Quantile of the standard normal distribution to nine decimals, for constants.

    It is computed with libm, whose variants differ in the sixteenth digit: constants must not lie so near a tie.
    """
    return round(NormalDist().inv_cdf(probability), _DECIMALS)


def normal_probability(quantile: float) -> float:
    """The inverse of ``normal_quantile``, as exact."""
    return round(NormalDist().cdf(quantile), _DECIMALS)


def blocks(numbers: int, rows: int) -> Iterator[slice]:
    """Of rows of so many numbers, as many of each as stay in a core's own cache at a time."""
    step = max(_BLOCK // rows, 1)
    for start in range(0, numbers, step):
        yield slice(start, start + step)


def _of_each(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """A function of float64 values of one axis, which it leaves as they are, of numbers of any shape and type."""
    flat = np.ascontiguousarray(values, np.float64).reshape(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        if 0 < flat.size <= _BLOCK:
            return function(flat).reshape(np.shape(values))
        result = np.empty(flat.shape)
        for block in blocks(flat.size, 1):
            result[block] = function(flat[block])
    return result.reshape(np.shape(values))


def _total(values: np.ndarray) -> np.ndarray:
    """Along the first axis."""
    count = len(values)
    while count > 1:
        half = (count + 1) // 2
        folded = np.add(values[: count - half], values[half:], order="C")
        values, count = folded if count % 2 == 0 else np.concatenate([folded, values[half - 1 : half]]), half
    return np.asarray(values[0])


def _log(x: np.ndarray) -> np.ndarray:
    regular = x.min() >= _SMALLEST and x.max() <= _LARGEST  # NaN is neither
    full = x
    if not regular:
        small = np.abs(x) < _SMALLEST
        full = x.copy()
        full[small] *= _LIFT
    # Of a number of full precision the bits are those of 1 + f, and 2^52 times e beside them.
    bits = full.view(np.int64)
    exponent = bits - _ROOT_HALF_BITS
    exponent >>= _MANTISSA
    f = (bits - (exponent << _MANTISSA)).view(np.float64)
    f -= 1.0
    e = exponent.astype(np.float64)
    if not regular:
        e[small] -= _LIFTED
    s = f + 2.0
    np.divide(f, s, out=s)
    z = s * s
    half_square = f * f
    half_square *= 0.5
    rest = _polynomial(_LOG, z)
    rest *= z
    rest += half_square
    rest *= s
    rest += e * _LN2_LOW
    half_square -= rest
    half_square -= f
    e *= _LN2_HIGH
    e -= half_square
    if not regular:
        e[x == 0] = -np.inf
        e[x == np.inf] = np.inf
        e[~(x >= 0)] = np.nan
    return e


def _arctanh(x: np.ndarray) -> np.ndarray:
    size = np.abs(x)
    ratio = 1.0 + size
    ratio /= 1.0 - size
    result = _log(ratio)
    result *= 0.5
    return np.copysign(result, x)


def _arcsin(x: np.ndarray) -> np.ndarray:
    above = x > 0.5
    if not above.any():
        return _small_angle(x, x * x)
    if above.all():
        z = 0.5 * (1.0 - x)
        result = _small_angle(np.sqrt(z), z)
        result += result
        return _HALF_PI - result
    z = np.where(above, 0.5 * (1.0 - x), x * x)
    result = _small_angle(np.where(above, np.sqrt(z), x), z)
    return np.where(above, _HALF_PI - (result + result), result)


def _small_angle(s: np.ndarray, z: np.ndarray) -> np.ndarray:
    """arcsin s up to 1/2, with z = s^2."""
    result = _polynomial(_ARCSIN_P, z)
    result *= z
    result /= _polynomial(_ARCSIN_Q, z)
    result *= s
    result += s
    return result


def _polynomial(coefficients: tuple[float, ...], z: np.ndarray) -> np.ndarray:
    """Horner's rule, the constant term first."""
    result = z * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        result += coefficient
        result *= z
    result += coefficients[0]
    return result
