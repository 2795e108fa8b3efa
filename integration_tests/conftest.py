"""Fixtures of the integration tests."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration_tests.harness import JobHandle, start_job
from integration_tests.processes import EXTENSIONS, ROOT, base_environment, signal_tree
from integration_tests.runs import start_scenarios

HERE = Path(__file__).resolve().parent
BUILD = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where what the first job needs was never built, build it beside the unit tests, which take one core."""
    asked_for = any(item.path.parent == HERE for item in session.items)
    if asked_for and not session.config.option.collectonly and not (EXTENSIONS / "done").exists():
        session.config.stash[BUILD] = subprocess.Popen(
            [sys.executable, "-c", "from integration_tests.processes import warm_extensions; warm_extensions()"],
            env=base_environment(),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # if it fails, the first job tries again and says why
            start_new_session=True,
        )


def pytest_unconfigure(config: pytest.Config) -> None:
    if BUILD in config.stash:
        signal_tree(config.stash[BUILD], signal.SIGKILL)
        config.stash[BUILD].wait()


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
