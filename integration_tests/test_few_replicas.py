"""Without a majority of replicas messages are compared with the recent past; what that cannot decide is said."""

from __future__ import annotations

import math

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario

START, STEPS = 26, 30
BASE = Scenario(name="watched", steps=STEPS, hidden=64, lengths=(48,))


@pytest.fixture(scope="module", params=[1, 2])
def runs(request, tmp_path_factory):
    replicas = request.param
    folder = tmp_path_factory.mktemp(f"replicas{replicas}")
    fault = {"stage": 1, "replica": replicas - 1, "attack": "constant", "start_step": START}
    block = {"enabled": True, "output_dir": str(folder / "logs"), "inject": [fault]}
    return run_scenarios([BASE.with_(sentinel=block)], stages=3, replicas=replicas, folder=folder, timeout=150)


def test_a_fault_is_found_against_the_recent_past(runs):
    run, culprit = runs["watched"][0], [1, runs.replicas - 1]
    for verdict in run.verdicts[START:]:
        # Against the recent past alone an honest message is conspicuous more often, so others may be suspects too.
        assert culprit in [finding["worker"] for finding in verdict["findings"]]
        assert verdict["excluded"] == [False] * (runs.replicas - 1) + [True]
        assert verdict["skip"] == (runs.replicas == 1)
    assert run.verdicts[START + 2]["newly_convicted"] == [culprit]
    assert [verdict["newly_convicted"] for verdict in run.verdicts].count([]) == STEPS - 1
    assert not any(verdict["findings"] or verdict["skip"] for verdict in run.verdicts[:START])


def test_with_one_replica_the_steps_are_skipped_and_counted(runs):
    run = runs["watched"][0]
    skipped = (STEPS - START) * (runs.replicas == 1)
    assert run.record["skipped_steps"] == run.record["counts"]["skipped_steps"] == skipped
    assert [math.isnan(loss) for loss in run.losses] == [False] * (STEPS - skipped) + [True] * skipped


def test_it_says_what_it_cannot_decide(runs):
    said = {
        1: "1 replica: messages are compared with their own recent past only",
        2: "a change that both replicas share cannot be told from an attack",
    }
    assert said[runs.replicas] in runs.job.stderr[0] + runs.job.stdout[0]
