"""A judge's state that comes from outside, looked over before it is taken up.

A checkpoint may be of another version, cut off, or written by a machine whose memory is at fault, and what is wrong in
it once would stay: a NaN among what is usual of a column makes all its residuals NaN, which is no alarm. What a state
must look like is what that of a new judge looks like:

* the same names, of the same kinds;
* the same shapes, but for axes of length 0, which grow with what is learnt, and alike in arrays that begin alike;
* no infinity, nothing beyond ``LARGEST``, no count that is negative or beyond ``MOST``, and NaN only where a new judge
  has NaN for what is not known yet, or nothing at all;
* what a part of the judge bounds, within its ``limits``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

LARGEST = 1e60  # far more than any sum of float32 numbers
MOST = 1 << 53  # what no count of steps comes to, and from which none wraps
Limits = Mapping[str, tuple[float, float]]


def problem(state: Any, new: Mapping[str, Any], limits: Mapping[str, Limits]) -> str | None:
    """What is wrong with a state, in words that can follow "checkpoint ..."; None if nothing is.

    Args:
        state: anything; arrays by name, or such mappings by name.
        new: the state of a new judge, of arrays by name or such mappings by name.
        limits: least and largest value, by the part's name and the array's.
    """
    if not isinstance(state, Mapping):
        return "has no state of the judge"
    if missing := set(new) - set(state):
        return f"has no {_listed(missing)} of the judge"
    if unknown := set(state) - set(new):
        return f"has a judge with {_listed(unknown)}, which is not known here"
    for name, expected in new.items():
        found = (
            problem(state[name], expected, {"": limits.get(name, {})})
            if isinstance(expected, Mapping)
            else _of_array(state[name], np.asarray(expected), limits.get("", {}).get(name))
        )
        if found:
            return found if isinstance(expected, Mapping) else f'holds a judge whose "{name}" {found}'
    grown: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name, expected in new.items():
        shape = np.shape(expected) if not isinstance(expected, Mapping) else ()
        if 0 in shape and grown.setdefault(shape, np.shape(state[name])) != np.shape(state[name]):
            return f'holds a judge whose "{name}" has the shape {list(np.shape(state[name]))}'
    return None


def _of_array(array: Any, new: np.ndarray, limits: tuple[float, float] | None) -> str | None:
    if not isinstance(array, np.ndarray) or array.dtype != new.dtype:
        return f"is {getattr(array, 'dtype', type(array).__name__)} (here {new.dtype})"
    if array.ndim != new.ndim or any(mine not in (0, size) for size, mine in zip(array.shape, new.shape, strict=True)):
        return f"has the shape {list(array.shape)} (here {list(new.shape)})"
    if new.dtype == np.bool_:
        return None
    least, largest = limits or ((-LARGEST, LARGEST) if new.dtype == np.float64 else (0, MOST))
    missing = np.isnan(array)
    if missing.any() and new.size and not np.isnan(new).any():
        return "holds NaN"
    if not (missing | ((array >= least) & (array <= largest))).all():
        return f"is not between {least:g} and {largest:g}"
    return None


def _listed(names: set[Any]) -> str:
    return ", ".join(sorted(f'"{name}"' for name in names))
