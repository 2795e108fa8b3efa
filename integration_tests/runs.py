"""Scenarios in one job: start, wait, and read what each rank recorded of each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from integration_tests.harness import ROOT, JobHandle, JobResult, Launcher, start_job
from integration_tests.scenario import Scenario

SCRIPT = ROOT / "integration_tests" / "jobs" / "scenarios.py"


@dataclass(frozen=True)
class Run:
    """What one rank recorded of one scenario.

    Attributes:
        record: the dict that jobs/scenarios.py wrote: losses, verdicts, counts, error, weights_sha256, ...
        weights_file: the stage's final weights, for ``weights``.
    """

    rank: int
    stage: int
    replica: int
    record: dict[str, Any]
    weights_file: Path

    @property
    def losses(self) -> list[float]:
        """Training loss of each step, exact."""
        return [float.fromhex(loss) for loss in self.record["losses"]]

    @property
    def error(self) -> dict[str, str] | None:
        """{"type", "message", "traceback"} of the exception that ended the scenario, if one did."""
        return self.record["error"]

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """A summary of each step's verdict, see jobs/scenarios.py."""
        return self.record["verdicts"]

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Final weights of the rank's stage by parameter name (global layer numbers)."""
        return torch.load(self.weights_file)


@dataclass(frozen=True)
class ScenarioRuns:
    """The runs of one job: ``runs["name"]`` is a tuple of ``Run``, one a rank."""

    job: JobResult
    stages: int
    replicas: int

    def __getitem__(self, name: str) -> tuple[Run, ...]:
        runs = []
        for rank, result in enumerate(self.job.results):
            if result is None or name not in result["scenarios"]:
                raise AssertionError(f"rank {rank} has no result for {name!r}\n{self.job.describe()}")
            weights = self.job.folder / f"{name}.{rank}.pt"
            runs.append(Run(rank, result["stage"], result["replica"], result["scenarios"][name], weights))
        return tuple(runs)

    def at(self, name: str, stage: int, replica: int) -> Run:
        """The run of one worker."""
        return self[name][stage * self.replicas + replica]


def start_scenarios(
    scenarios: Sequence[Scenario],
    stages: int,
    replicas: int,
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    launcher: Launcher = "bare",
    group_timeout: float = 60.0,
) -> JobHandle:
    """Start a job that runs the scenarios one after the other; ``group_timeout``: the collectives'."""
    names = [scenario.name for scenario in scenarios]
    if len(set(names)) != len(names):
        raise ValueError(f"scenario names must differ, got {names}.")
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps([scenario.to_json() for scenario in scenarios]), encoding="utf-8")
    args = [f"--plan={plan}", f"--output={folder}", f"--stages={stages}", f"--group-timeout={group_timeout}"]
    return start_job(SCRIPT, stages, replicas, folder=folder, args=args, env=env, launcher=launcher)


def run_scenarios(
    scenarios: Sequence[Scenario],
    stages: int,
    replicas: int,
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    launcher: Launcher = "bare",
    group_timeout: float = 60.0,
    timeout: float = 120.0,
    check: bool = True,
) -> ScenarioRuns:
    """Run the scenarios in one job. With ``check``, AssertionError if any process failed or time ran out."""
    with start_scenarios(
        scenarios,
        stages,
        replicas,
        folder=folder,
        env=env,
        launcher=launcher,
        group_timeout=group_timeout,
    ) as job:
        result = job.wait(timeout)
    return ScenarioRuns(result.check() if check else result, stages, replicas)
