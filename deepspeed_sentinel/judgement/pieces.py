"""The links of a mesh in pieces that stay in a core's own cache while everything about them is worked out.

Arrays of a step hold a number for each statistic and message: tens of megabytes in a large mesh, and each pass over
them costs as much as reading memory does. What is worked out link by link is done piece by piece instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deepspeed_sentinel.evidence import exact

_VALUES = 131072


def pieces(array: np.ndarray) -> Iterator[slice]:
    """Of the second axis of [K, N, ...], so that a piece holds about as many values as stay near."""
    links = array.shape[1]
    step = max(_VALUES * links // max(array.size, 1), 1)
    for start in range(0, links, step):
        yield slice(start, start + step)


def in_a_row(array: np.ndarray, axis: int = 1) -> np.ndarray:
    """[..., 2, L, ...], both directions of all links, as [..., 2 L, ...]; of an array in one piece it is a view."""
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


def sums(values: np.ndarray, chosen: np.ndarray, plus: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Over the messages of each column, what is missing left out, and of how many that is.

    Args:
        values: float64 [K, 2, L, C, M], NaN where missing.
        chosen: bool [2, L, C, M] or [K, 2, L, C, M], which messages count.
        plus: float64 [K, 2, L, C], added to each value; NaN is missing, None nothing.

    Returns:
        float64 and int64 [K, 2, L, C].
    """
    flat, chosen = in_a_row(values), in_a_row(chosen, chosen.ndim - 4)
    everything = chosen.all()
    chosen = np.broadcast_to(chosen, flat.shape)
    more = None if plus is None else in_a_row(plus)[..., None]
    total, count = np.empty(flat.shape[:-1]), np.full(flat.shape[:-1], flat.shape[-1])
    for links in pieces(flat):
        piece = flat[:, links] if more is None else flat[:, links] + more[:, links]
        total[:, links] = exact.total(piece)
        rows = np.arange(len(piece))
        if everything:  # what is NaN makes the sum NaN
            rows = np.flatnonzero(np.isnan(total[:, links]).any(axis=(1, 2)))
        if rows.size:
            known = ~np.isnan(piece[rows]) & chosen[rows, links]
            count[rows, links] = exact.count(known)
            total[rows, links] = exact.total(np.where(known, piece[rows], 0.0))
    return total.reshape(values.shape[:-1]), count.reshape(values.shape[:-1])
