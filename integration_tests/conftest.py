"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration_tests.harness import JobHandle, start_job
from integration_tests.runs import start_scenarios


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> Callable[..., set[Any]]:
    """``selected("name")``: the values of that parameter in the tests of this module that are going to run."""

    def values(*parameters: str) -> set[Any]:
        calls = [
            item.callspec.params
            for item in request.session.items
            if getattr(item, "module", None) is request.module and hasattr(item, "callspec")
        ]
        return {call[parameter] for call in calls for parameter in parameters if parameter in call}

    return values


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[..., JobHandle]]:
    """``jobs(script, stages, replicas, ...)`` as ``start_job``, in a folder of its own, ended after the test.

    With a list of scenarios in place of a script it is ``start_scenarios``.
    """
    started: list[JobHandle] = []

    def start(what: Any, stages: int, replicas: int, **options: Any) -> JobHandle:
        options.setdefault("folder", tmp_path / f"job{len(started)}")
        begin = start_scenarios if isinstance(what, (list, tuple)) else start_job
        started.append(begin(what, stages, replicas, **options))
        return started[-1]

    yield start
    for job in started:
        job.stop()
