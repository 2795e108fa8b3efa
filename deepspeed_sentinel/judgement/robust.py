"""Order statistics that skip missing values, vectorised over leading axes."""

from __future__ import annotations

import numpy as np


def quantiles(values: np.ndarray, probabilities: tuple[float, ...]) -> np.ndarray:
    """Quantiles along the last axis, NaN skipped, linear between ranks.

    Args:
        values: float64 [..., N].
        probabilities: Q numbers from 0 to 1.

    Returns:
        float64 [Q, ...]; NaN where every value is NaN.
    """
    ordered = np.sort(values, axis=-1)  # NaN sort last
    count = np.count_nonzero(~np.isnan(ordered), axis=-1)
    last = np.maximum(count - 1, 0)
    result = []
    for probability in probabilities:
        position = probability * last
        low = np.floor(position).astype(np.intp)
        high = np.minimum(low + 1, last)
        at_low = np.take_along_axis(ordered, low[..., None], -1)[..., 0]
        at_high = np.take_along_axis(ordered, high[..., None], -1)[..., 0]
        result.append(at_low + (at_high - at_low) * (position - low))
    return np.stack(result)


def median(values: np.ndarray) -> np.ndarray:
    """``quantiles(values, (0.5,))[0]``, without sorting where a row misses all of its values or none."""
    missing = np.isnan(values)
    absent = missing.all(-1)
    if (missing.any(-1) != absent).any() or values.shape[-1] == 0:
        return quantiles(values, (0.5,))[0] if values.shape[-1] else np.full(values.shape[:-1], np.nan)
    middle = values.shape[-1] // 2
    lower = middle if values.shape[-1] % 2 else middle - 1
    ordered = np.partition(values, (lower, middle), axis=-1)
    low, high = ordered[..., lower], ordered[..., middle]
    return np.asarray(np.where(absent, np.nan, low + (high - low) * 0.5))
