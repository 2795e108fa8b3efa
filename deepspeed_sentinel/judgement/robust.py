"""Order statistics that skip missing values, vectorised over leading axes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.evidence import exact


@dataclass(frozen=True)
class Ordered:
    """Values along the last axis in ascending order.

    Attributes:
        values: float64 [..., N], NaN last.
        count: int [...], how many are not NaN.
    """

    values: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Ordered:
        ordered = np.array(values, order="C")  # rows in one piece are sorted faster
        ordered.sort(axis=-1)
        return cls(ordered, exact.count(~np.isnan(ordered)))

    def quantiles(self, probabilities: tuple[float, ...]) -> np.ndarray:
        """float64 [Q, ...], linear between ranks; NaN where every value is NaN."""
        last = np.maximum(self.count - 1, 0)
        position = np.array(probabilities).reshape(-1, *(1 for _ in last.shape)) * last
        low = position.astype(np.intp)
        at_low, at_high = self.at(low), self.at(np.minimum(low + 1, last))
        return at_low + (at_high - at_low) * (position - low)

    def at(self, ranks: np.ndarray) -> np.ndarray:
        """The values of these ranks, int [...] or [Q, ...]."""
        size = self.values.shape[-1]
        starts = np.arange(self.count.size).reshape(self.count.shape) * size
        return self.values.reshape(-1)[starts + ranks]

    def outer(self, each: int) -> np.ndarray:
        """The least and the largest values, float64 [..., 2 * each], no value twice; NaN where there are too few."""
        n = np.arange(each).reshape(-1, *(1 for _ in self.count.shape))
        least = np.where(n < self.count, self.at(np.minimum(n, self.values.shape[-1] - 1)), np.nan)
        place = self.count - 1 - n
        largest = np.where(place >= each, self.at(np.maximum(place, 0)), np.nan)
        return np.moveaxis(np.concatenate([least, largest]), 0, -1)


def quantiles(values: np.ndarray, probabilities: tuple[float, ...]) -> np.ndarray:
    """Quantiles along the last axis, NaN skipped, linear between ranks.

    Args:
        values: float64 [..., N].
        probabilities: Q numbers from 0 to 1.

    Returns:
        float64 [Q, ...]; NaN where every value is NaN.
    """
    return Ordered.of(values).quantiles(probabilities)


def median(values: np.ndarray) -> np.ndarray:
    """``quantiles(values, (0.5,))[0]``, without sorting."""
    size = values.shape[-1]
    if size == 0:
        return np.full(values.shape[:-1], np.nan)
    parted = values.copy()
    parted.partition(size // 2)
    missing = np.isnan(np.maximum.reduce(parted[..., size // 2 :], axis=-1))  # NaN stand last
    result = np.asarray(_middle(parted, size))
    if missing.any():
        rows = values[missing]
        known = exact.count(~np.isnan(rows))
        medians = np.full(known.shape, np.nan)
        for count in sorted({*known.tolist()} - {0}):
            alike = known == count
            medians[alike] = _middle(np.partition(rows[alike], count // 2, axis=-1), count)
        result[missing] = medians
    return result


def _middle(parted: np.ndarray, count: int) -> np.ndarray:
    """The median of the ``count`` least of each row, which stands in place in the middle of them."""
    high = parted[..., count // 2]
    low = high if count % 2 else np.maximum.reduce(parted[..., : count // 2], axis=-1)
    return low + (high - low) * 0.5


def shortest_interval(values: np.ndarray, share: float) -> np.ndarray:
    """Length of the shortest interval that holds at least a share of a row's values, NaN skipped.

    Args:
        values: float64 [..., N].
        share: above 0, at most 1.

    Returns:
        float64 [...]; NaN where every value is NaN.
    """
    size = values.shape[-1]
    if size == 0:
        return np.full(values.shape[:-1], np.nan)
    ordered = np.sort(values, axis=-1)  # NaN sort last
    further = max(int(np.ceil(share * size)) - 1, 0)
    result = np.asarray((ordered[..., further:] - ordered[..., : size - further]).min(-1))
    missing = np.isnan(ordered[..., -1])
    if missing.any():
        result[missing] = _shortest_of_some(ordered[missing], share)
    return result


def _shortest_of_some(ordered: np.ndarray, share: float) -> np.ndarray:
    """Of rows [N, size] that end with what is missing."""
    count = exact.count(~np.isnan(ordered))
    further = np.maximum(np.ceil(share * count).astype(np.intp) - 1, 0)[..., None]
    last = np.arange(ordered.shape[-1]) + further
    ends = np.take_along_axis(ordered, np.minimum(last, ordered.shape[-1] - 1), -1)
    lengths = np.where(last < count[..., None], ends - ordered, np.inf)
    return np.asarray(np.where(count > 0, lengths.min(-1), np.nan))
