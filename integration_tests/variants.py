"""Variants of one test: some in every run, the others behind the marker ``long``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(names: Iterable[Any], in_every_run: Collection[Any]) -> list[Any]:
    """Parameters of a test, tuples where it takes several: those not ``in_every_run`` are for ``make test-all``."""

    def given(name: Any) -> tuple[Any, ...]:
        return name if isinstance(name, tuple) else (name,)

    return [name if name in in_every_run else pytest.param(*given(name), marks=pytest.mark.long) for name in names]
