"""Twin steps in live runs: what no statistic sees is proved in the first one in which it acts, and nobody else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepspeed_sentinel.mesh import Worker
from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.variants import some

STEPS, START = 6, 3
BASE = Scenario(name="base", steps=STEPS, hidden=32, lengths=(16,))
CULPRIT = [1, 2]
INJECTED: dict[str, dict[str, Any]] = {
    "rounded": {"attack": "low_precision"},
    "biased": {"attack": "bias", "size": 0.001, "direction": "backward"},
    "flipped": {"attack": "bit_flip"},
}
HOOKS = {"stale": "stale_weights", "scaled": "wrong_gradients"}
UNLIKE = ("unlike_by_nature", "other_hardware")
REDUCED = {"memory": "poisoned_memory", "reduction": "poisoned_reduction"}
HOOKED = {**HOOKS, **REDUCED, **dict(zip(UNLIKE, UNLIKE, strict=True))}
# What training may be like; each is run without a fault for as long as TWINS says.
CLEAN: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16_zero1": {"precision": "bf16_zero1"},
    "bf16_zero1_bf16": {"precision": "bf16_zero1_bf16"},
    "fp16_zero1": {"precision": "fp16_zero1"},
    "fp32_zero1": {"precision": "fp32_zero1"},
    "tied": {"tied": True},
    "checkpointed": {"activation_checkpoint_interval": 1},
    "tuples": {"tuple_messages": "int"},
    "dynamic": {"dynamic_shape": True, "lengths": (16, 24)},
    "dropout": {"hook": "integration_tests.twin_faults:dropout"},
}
IN_EVERY_RUN = ("fp32", "dropout", "rounded", "scaled", "other_hardware", "memory")


def block(folder, name: str, **more: Any) -> dict[str, Any]:
    return {
        "enabled": True,
        "output_dir": str(folder / f"logs_{name}"),
        "events": "steps",
        "warmup_steps": 8,
        "seed": 13,  # twin steps are 0, 2, 4 and 5
        "twins": {"every": 2},
        **more,
    }


def hook(name: str) -> str:
    return f"integration_tests.twin_faults:{name}"


def scenarios(folder, clean, faulty) -> list[Scenario]:
    found = [BASE.with_(name=name, sentinel=block(folder, name), **CLEAN[name]) for name in clean]
    for name in faulty:
        if name in INJECTED:
            inject = [{"stage": 1, "replica": 2, "direction": "forward", "start_step": START, **INJECTED[name]}]
            found.append(BASE.with_(name=name, sentinel=block(folder, name, inject=inject)))
        else:
            found.append(BASE.with_(name=name, sentinel=block(folder, name), hook=hook(HOOKED[name])))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory, selected):
    folder = tmp_path_factory.mktemp("twins")
    clean = [name for name in CLEAN if name in selected("clean") | {"fp32"}]
    faulty = [name for name in (*INJECTED, *HOOKED) if name in selected("name") | {"rounded"}]
    return run_scenarios(scenarios(folder, clean, faulty), stages=3, replicas=3, folder=folder, timeout=900)


def of_twins(run) -> list[dict[str, Any]]:
    return [verdict for verdict in run.verdicts if verdict["twins"]]


@pytest.mark.parametrize("clean", some(CLEAN, IN_EVERY_RUN))
def test_without_a_fault_nothing_is_proved_and_nobody_is_left_out(runs, clean):
    for run in runs[clean]:
        assert run.error is None, run.error
        assert len(of_twins(run)) >= 3 and not any(run.record["poisoned"])
        for verdict in run.verdicts:
            assert not (verdict["proofs"] or verdict["differences"] or any(verdict["excluded"]))
            assert all(verdict["alike"]), "a clean twin step finds all gradients of a stage equal"


def check_seen(run, name: str) -> None:
    """What a culprit fed to a reduction was seen in the twin steps in which it acted, and not applied."""
    assert run.error is None, run.error
    acted = [verdict["step"] for verdict in of_twins(run) if verdict["step"] >= START]
    seen = [step for step, told in enumerate(run.record["poisoned"]) if told]
    # Who is convicted hands nothing to a reduction any more.
    assert seen == (acted[:1] if name == "memory" else acted)
    assert run.record["skipped_steps"] == len(seen)
    named = f"{Worker(*CULPRIT)} handed over" in run.record["poisoned"][seen[0]]
    assert named == (name == "memory")


@pytest.mark.parametrize("name", some(REDUCED, IN_EVERY_RUN))
def test_a_reduction_that_is_fed_something_else_is_seen_and_not_applied(runs, name):
    for run in runs[name]:
        check_seen(run, name)
        convicted = [worker for verdict in run.verdicts for worker in verdict["newly_convicted"]]
        assert convicted == ([CULPRIT] if name == "memory" else [])


@pytest.mark.parametrize("name", some([*INJECTED, *HOOKS], IN_EVERY_RUN))
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


@pytest.mark.parametrize("name", some(UNLIKE, IN_EVERY_RUN))
def test_work_that_rounds_differently_for_honest_reasons_is_no_proof(runs, name):
    for run in runs[name]:
        assert run.error is None, run.error
        for verdict in run.verdicts:
            assert not (verdict["proofs"] or any(map(any, verdict["convicted"])))
            # What comes of other hardware is left out where the others' exact work has the same data.
            left_out = name == "other_hardware" and verdict["twins"]
            assert verdict["excluded"] == [False, False, left_out]
        alike = [True, name == "other_hardware", True]
        assert all(verdict["alike"] == alike for verdict in of_twins(run))
        assert not any(run.record["poisoned"])


def test_after_a_twin_step_all_replicas_hold_the_same_weights(runs):
    for name in ("fp32", "rounded"):
        for stage in range(3):
            one, *others = [run.weights for run in runs[name] if run.stage == stage]
            assert all(torch.equal(one[key], other[key]) for other in others for key in one)
