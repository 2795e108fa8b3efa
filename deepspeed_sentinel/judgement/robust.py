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
    last = np.maximum(count - 1, 0)[..., None]
    position = np.asarray(probabilities) * last
    low = position.astype(np.intp)
    at_low = np.take_along_axis(ordered, low, -1)
    at_high = np.take_along_axis(ordered, np.minimum(low + 1, last), -1)
    return np.moveaxis(at_low + (at_high - at_low) * (position - low), -1, 0)


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


def shortest_interval(values: np.ndarray, share: float) -> np.ndarray:
    """Length of the shortest interval that holds at least a share of a row's values, NaN skipped.

    Args:
        values: float64 [..., N].
        share: above 0, at most 1.

    Returns:
        float64 [...]; NaN where every value is NaN.
    """
    ordered = np.sort(values, axis=-1)  # NaN sort last
    count = np.count_nonzero(~np.isnan(ordered), axis=-1)
    further = np.maximum(np.ceil(share * count).astype(np.intp) - 1, 0)[..., None]
    last = np.arange(values.shape[-1]) + further
    ends = np.take_along_axis(ordered, np.minimum(last, values.shape[-1] - 1), -1)
    lengths = np.where(last < count[..., None], ends - ordered, np.inf)
    return np.asarray(np.where(count > 0, lengths.min(-1), np.nan))
