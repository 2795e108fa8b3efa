"""From columns to the replicas that served them."""

from __future__ import annotations

import numpy as np


def of_replicas(by_column: np.ndarray, served: np.ndarray, replicas: int) -> np.ndarray:
    """Which replicas served a column that is marked.

    Example: columns (yes, no, yes) served by replicas (2, 1, 0) mark replicas 0 and 2.

    Args:
        by_column: bool [..., S, C].
        served: int [S, C], the replica of each of these stages that served each column.
        replicas: R.

    Returns:
        bool [..., S, R].
    """
    serves = served[..., None] == np.arange(replicas)  # [S, C, R]
    return np.asarray((by_column[..., None] & serves).any(-2))


def most(marked: np.ndarray) -> np.ndarray:
    """Where more than half of all replicas are marked, bool [...] of [..., R]."""
    return np.asarray(2 * np.count_nonzero(marked, axis=-1) > marked.shape[-1])
