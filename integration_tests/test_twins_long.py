"""Twin steps for longer, on a larger mesh and sharded: 200 clean steps, 4 x 4 with one step in five, ZeRO-1."""

from __future__ import annotations

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.test_twins import (
    BASE,
    CLEAN,
    CULPRIT,
    HOOKS,
    INJECTED,
    REDUCED,
    START,
    block,
    check_seen,
    hook,
    of_twins,
)

pytestmark = pytest.mark.long
STEPS = 200
SHARDED = ("fp32_zero1", "bf16_zero1", "bf16_zero1_bf16")
FOR_LONG = ("fp32", "bf16", "bf16_zero1", "tied", "checkpointed")


@pytest.fixture(scope="module")
def clean(tmp_path_factory, selected):
    folder = tmp_path_factory.mktemp("clean")
    kinds = [name for name in FOR_LONG if name in selected("name")]
    scenarios = [BASE.with_(name=name, steps=STEPS, sentinel=block(folder, name), **CLEAN[name]) for name in kinds]
    return run_scenarios(scenarios, stages=3, replicas=3, folder=folder, timeout=2400)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    rare = {"twins": {"every": 5}}
    scenarios = []
    for name, fault in INJECTED.items():
        inject = [{"stage": 1, "replica": 2, "direction": "forward", "start_step": START, **fault}]
        scenarios.append(BASE.with_(name=name, steps=30, sentinel=block(folder, name, inject=inject, **rare)))
    for name, function in HOOKS.items():
        scenarios.append(BASE.with_(name=name, steps=30, sentinel=block(folder, name, **rare), hook=hook(function)))
    return run_scenarios(scenarios, stages=4, replicas=4, folder=folder, timeout=2400)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    scenarios = [
        BASE.with_(
            name=f"{name}_{precision}",
            precision=precision,
            sentinel=block(folder, f"{name}_{precision}"),
            hook=hook(REDUCED[name]),
        )
        for precision in SHARDED
        for name in REDUCED
    ]
    return run_scenarios(scenarios, stages=3, replicas=3, folder=folder, timeout=600)


@pytest.mark.parametrize("name", FOR_LONG)
def test_two_hundred_clean_steps_prove_nothing(clean, name):
    for run in clean[name]:
        assert run.error is None, run.error
        assert len(of_twins(run)) > 80 and not any(run.record["poisoned"])
        for verdict in run.verdicts:
            assert not (verdict["proofs"] or verdict["differences"] or verdict["newly_convicted"])
            assert all(verdict["alike"])


@pytest.mark.parametrize("name", [*INJECTED, *HOOKS])
def test_on_four_by_four_the_first_twin_step_proves_it(faulty, name):
    for run in faulty[name]:
        assert run.error is None, run.error
        acted = [verdict for verdict in of_twins(run) if verdict["step"] >= START]
        assert acted and acted[0]["newly_convicted"] == [CULPRIT]
        assert all(proof == CULPRIT for verdict in run.verdicts for proof in verdict["proofs"])
        assert all(sum(map(sum, verdict["convicted"])) <= 1 for verdict in run.verdicts)


@pytest.mark.parametrize("precision", SHARDED)
@pytest.mark.parametrize("name", REDUCED)
def test_a_sharded_reduction_that_is_fed_something_else_is_seen_and_not_applied(sharded, name, precision):
    runs = sharded[f"{name}_{precision}"]
    for run in runs:
        check_seen(run, name)
    for stage in range(3):
        assert len({run.record["weights_sha256"] for run in runs if run.stage == stage}) == 1
