"""Twin steps in live runs: what no statistic sees is proved in the first one in which it acts, and nobody else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario

STEPS, START = 14, 4
BASE = Scenario(name="base", steps=STEPS, hidden=32, lengths=(16,))
CULPRIT = [1, 2]
INJECTED: dict[str, dict[str, Any]] = {
    "rounded": {"attack": "low_precision"},
    "biased": {"attack": "bias", "size": 0.001, "direction": "backward"},
    "flipped": {"attack": "bit_flip"},
}
HOOKS = {
    "stale": "integration_tests.twin_faults:stale_weights",
    "scaled": "integration_tests.twin_faults:wrong_gradients",
}


def block(folder, name: str, **more: Any) -> dict[str, Any]:
    return {
        "enabled": True,
        "output_dir": str(folder / f"logs_{name}"),
        "events": "steps",
        "warmup_steps": 8,
        "seed": 3,
        "twins": {"every": 2},
        **more,
    }


def scenarios(folder) -> list[Scenario]:
    found = [BASE.with_(name="clean", sentinel=block(folder, "clean"))]
    for name, fault in INJECTED.items():
        inject = [{"stage": 1, "replica": 2, "direction": "forward", "start_step": START, **fault}]
        found.append(BASE.with_(name=name, sentinel=block(folder, name, inject=inject)))
    for name, hook in HOOKS.items():
        found.append(BASE.with_(name=name, sentinel=block(folder, name), hook=hook))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twins")
    return run_scenarios(scenarios(folder), stages=3, replicas=3, folder=folder, timeout=600)


def of_twins(run) -> list[dict[str, Any]]:
    return [verdict for verdict in run.verdicts if verdict["twins"]]


def test_without_a_fault_nothing_is_proved_and_nobody_is_left_out(runs):
    for run in runs["clean"]:
        assert run.error is None
        assert len(of_twins(run)) >= 3
        assert not any(
            verdict["proofs"] or verdict["differences"] or any(verdict["excluded"]) for verdict in run.verdicts
        )


@pytest.mark.parametrize("name", [*INJECTED, *HOOKS])
def test_who_acts_in_a_twin_step_is_proved_in_it_and_nobody_else_ever(runs, name):
    for run in runs[name]:
        assert run.error is None, run.error
        acted = [verdict for verdict in of_twins(run) if verdict["step"] >= START]
        assert acted[0]["proofs"] and acted[0]["newly_convicted"] == [CULPRIT]
        for verdict in run.verdicts:
            assert all(proof == CULPRIT for proof in verdict["proofs"])
            assert not verdict["differences"]
            assert sum(map(sum, verdict["convicted"])) <= 1
        assert all(verdict["excluded"] == [False, False, True] for verdict in acted)


def test_after_a_twin_step_all_replicas_hold_the_same_weights(runs):
    for name in ("clean", "rounded"):
        for stage in range(3):
            one, *others = [run.weights for run in runs[name] if run.stage == stage]
            assert all(torch.equal(one[key], other[key]) for other in others for key in one)
