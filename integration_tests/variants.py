"""Variants of one test: some in every run, the others behind the marker ``long``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(names: Iterable[str], in_every_run: Collection[str]) -> list[Any]:
    """Parameters of a test: those that are not ``in_every_run`` are for ``make test-all``."""
    return [name if name in in_every_run else pytest.param(name, marks=pytest.mark.long) for name in names]
