"""With fewer than three replicas there is no majority: what both do, or the only one, is training and no attack."""

from __future__ import annotations

import math
from itertools import chain

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.variants import some

# The run on other data warms up for all: the others go on from its checkpoint.
RESUMED, START, ATTACKED, TURN, STEPS = 7, 8, 11, 8, 17
BASE = Scenario(name="turn", steps=STEPS, hidden=64, lengths=(48,))


@pytest.fixture(scope="module", params=some((1, 2), (2,)))
def runs(request, tmp_path_factory):
    replicas = request.param
    folder = tmp_path_factory.mktemp(f"replicas{replicas}")
    saved = {"directory": str(folder / "saved")}

    def block(*faults):
        return {"enabled": True, "output_dir": str(folder / "logs"), "inject": list(faults), "warmup_steps": 5}

    worker = {"stage": 1, "replica": replicas - 1, "start_step": START}
    turn = BASE.with_(sentinel=block(), other_text_from=(TURN,) * replicas, save={**saved, "after_step": RESUMED})
    attacked = BASE.with_(steps=ATTACKED, load=saved)
    scenarios = [
        turn,
        attacked.with_(name="watched", sentinel=block({**worker, "attack": "constant"})),
        attacked.with_(name="broken", sentinel=block({**worker, "attack": "nan"})),
    ]
    return run_scenarios(scenarios, stages=3, replicas=replicas, folder=folder, timeout=300)


def attacked(run):
    return [verdict for verdict in run.verdicts if verdict["step"] >= START]


def test_a_fault_is_told_of_and_left_out_where_another_replica_shows_it(runs):
    run, culprit = runs["watched"][0], [1, runs.replicas - 1]
    before = [verdict for verdict in run.verdicts if verdict["step"] < START]
    assert not any(verdict["findings"] or verdict["skip"] for verdict in (*runs["turn"][0].verdicts[:RESUMED], *before))
    # In a step in which both replicas are given the same it is exact comparison that tells.
    named = [
        [
            *verdict["proofs"],
            *chain.from_iterable(verdict["differences"]),
            *(one["worker"] for one in verdict["findings"]),
        ]
        for verdict in attacked(run)
    ]
    told = [culprit in workers for workers in named]
    assert told[0]
    if runs.replicas == 1:
        assert not any(verdict["skip"] or any(verdict["excluded"]) for verdict in run.verdicts)
        assert not any(verdict["newly_convicted"] for verdict in run.verdicts)
        return
    assert all(told)
    assert all(verdict["excluded"] == [False, True] for verdict in attacked(run))
    assert [verdict["newly_convicted"] for verdict in run.verdicts if verdict["newly_convicted"]] == [[culprit]]


def test_what_is_not_finite_is_left_out_with_one_replica_too(runs):
    run, culprit = runs["broken"][0], [1, runs.replicas - 1]
    for verdict in attacked(run):
        assert verdict["excluded"] == [False] * (runs.replicas - 1) + [True]
        assert verdict["skip"] == (runs.replicas == 1)
    newly = [verdict["newly_convicted"] for verdict in attacked(run)]
    assert [culprit] in newly[:3] and sum(map(len, newly)) == 1
    skipped = (ATTACKED - START) * (runs.replicas == 1)
    assert run.record["skipped_steps"] == run.record["counts"]["skipped_steps"] == skipped
    assert [math.isnan(loss) for loss in run.losses] == [False] * (ATTACKED - RESUMED - skipped) + [True] * skipped


def test_a_change_of_data_in_all_replicas_stops_nothing(runs):
    run = runs["turn"][0]
    assert not any(verdict["skip"] or any(verdict["excluded"]) for verdict in run.verdicts)
    assert not any(verdict["newly_convicted"] for verdict in run.verdicts)
    assert len(run.losses) == STEPS and all(math.isfinite(loss) for loss in run.losses)


def test_it_says_what_it_cannot_decide(runs):
    said = {
        1: "1 replica: there is nothing to compare with",
        2: "only a replica that changes while the other does not is blamed",
    }
    assert said[runs.replicas] in runs.job.stderr[0] + runs.job.stdout[0]
