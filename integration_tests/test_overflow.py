"""fp16 with dynamic loss scaling, live: overflow is nobody's fault, and no shield for NaN far from the limit."""

from __future__ import annotations

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario

START, STEPS = 18, 21
# The scale begins far too high: the first steps overflow, and it has come down to the limit when the attack begins.
BASE = Scenario(
    name="plain",
    precision="fp16_zero1",
    steps=STEPS,
    micro_batches=4,
    hidden=64,
    config={"fp16": {"enabled": True, "initial_scale_power": 26, "loss_scale_window": 1000, "hysteresis": 1}},
)
# One column each of two stages: no majority of either says that it is the scale.
FAULTS = [
    {"stage": stage, "replica": replica, "attack": "nan", "direction": "backward", "start_step": START}
    for stage, replica in ((1, 0), (2, 1))
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overflow")
    block = {"enabled": True, "output_dir": str(folder / "logs"), "conviction": "statistics", "warmup_steps": 8}
    scenarios = [
        BASE,
        BASE.with_(name="attacked", sentinel={**block, "inject": FAULTS}),
    ]
    return run_scenarios(scenarios, stages=3, replicas=2, folder=folder, timeout=400)


def test_an_overflow_of_one_replica_costs_its_column_that_step_and_nobody_a_strike(runs):
    for plain, guarded in zip(runs["plain"], runs["attacked"], strict=True):
        before = guarded.verdicts[:START]
        assert plain.record["skipped_steps"] >= 3, "else nothing was searched for"
        findings = [finding for verdict in before for finding in verdict["findings"]]
        assert any(sum(verdict["excluded"]) == 1 for verdict in before), "one overflowed and the other did not"
        assert not any(finding["strikes"] for finding in findings)
        assert {finding["statistic"] for finding in findings} <= {"non_finite"}


def test_bad_workers_of_two_stages_are_no_overflow_where_no_gradient_is_near_the_limit(runs):
    for plain, attacked in zip(runs["plain"], runs["attacked"], strict=True):
        for verdict in attacked.verdicts[START:]:
            assert verdict["skip"] and not verdict["overflow"]
            assert [1, 0] in [finding["worker"] for finding in verdict["findings"] if finding["strikes"]]
        assert [verdict["newly_convicted"] for verdict in attacked.verdicts if verdict["newly_convicted"]] == [[[1, 0]]]
        assert attacked.record["skipped_steps"] == plain.record["skipped_steps"] + STEPS - START
        assert attacked.record["loss_scale"] == plain.record["loss_scale"], "the loss scaler had no part in it"
