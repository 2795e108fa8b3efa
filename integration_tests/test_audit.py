"""An accusation by a pair's statistics counts only when a trusted worker has confirmed it (P4)."""

from __future__ import annotations

import json

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.variants import some

# One clean run warms up for all: the others go on from its checkpoint.
RESUMED, START, STEPS = 9, 10, 13
BASE = Scenario(name="clean", steps=RESUMED, seed=1, hidden=64, lengths=(48,))
FAULT = {"replica": 1, "start_step": START}
FLIP = {"attack": "scaling", "factor": -1}
LIES = {
    # name: direction of the messages whose sketches worker (1, 1) forges
    "lie_forward": "forward",
    "lie_backward": "backward",
}
# What worker (1, 1) hands in when the auditor asks for what it kept (integration_tests/witnesses.py), and what that is
# called. In its sketches it lies too, else there would be no audit.
MORE = 3  # steps
WITNESSES = {"silent": "unheard", "garbage": "unheard", "another": "false"}
ATTACKS = {
    "flip_forward": {"stage": 1, **FLIP},
    "shuffle_forward": {"stage": 1, "attack": "token_shuffle"},
    "flip_backward": {"stage": 2, "direction": "backward", **FLIP},
}
# Of the others the silent one is waited for, two minutes the first time.
IN_EVERY_RUN = ("lie_forward", "shuffle_forward")
STANDS_ALONE = ["flip_forward"]  # the mean of its messages gives it away too, so nothing hangs on its neighbours' word


@pytest.fixture(scope="module")
def runs(tmp_path_factory, selected):
    folder = tmp_path_factory.mktemp("audit")
    faults = {
        **{name: {"stage": 1, "where": "sketch", "direction": way, **FLIP} for name, way in LIES.items()},
        **ATTACKS,
    }
    # Dealt anew, who lies would meet others; that is shown elsewhere.
    block = {"enabled": True, "warmup_steps": 7, "conviction": "statistics", "wiring": "static"}
    clean = BASE.with_(
        sentinel={**block, "output_dir": str(folder / "logs_clean")},
        save={"directory": str(folder / "clean"), "after_step": RESUMED},
    )
    wanted = selected("name")
    attacked = {
        name: BASE.with_(
            name=name,
            steps=STEPS,
            sentinel={**block, "output_dir": str(folder / f"logs_{name}"), "inject": [{**FAULT, **fault}]},
            load={"directory": str(folder / "clean")},
        )
        for name, fault in faults.items()
    }
    scenarios = [scenario for name, scenario in attacked.items() if name in wanted]
    lying = attacked["lie_forward"]
    for name in (name for name in WITNESSES if name in wanted):
        block = {**lying.sentinel, "output_dir": str(folder / f"logs_{name}")}
        hook = f"integration_tests.witnesses:{name}"
        scenarios.append(lying.with_(name=name, sentinel=block, hook=hook, steps=STEPS + MORE))
    plain = [BASE.with_(name="plain")] if "plain" in wanted else []
    return run_scenarios([*plain, clean, *scenarios], stages=4, replicas=3, folder=folder, timeout=400)


@pytest.mark.parametrize("name", some(["plain"], ()))
def test_keeping_messages_changes_nothing(runs, name):
    for plain, guarded in zip(runs[name], runs["clean"], strict=True):
        for key in ("losses", "weights_sha256"):
            assert guarded.record[key] == plain.record[key], key
        assert guarded.record["watched"] and not plain.record["watched"]


def attacked(run):
    return [verdict for verdict in run.verdicts if verdict["step"] >= START]


def events(runs, name, kind):
    lines = (runs.job.folder / f"logs_{name}" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize("name", some(LIES, IN_EVERY_RUN))
def test_who_lies_in_its_sketches_convicts_nobody_and_takes_out_its_own_column(runs, name):
    for run in runs[name]:
        assert not any(verdict["newly_convicted"] for verdict in run.verdicts)
        for verdict in attacked(run):
            assert verdict["excluded"] == [False, True, False]
            assert [(d["sender"], d["receiver"], d["about"]) for d in verdict["disputed"]] == [
                ([1, 1], [3, 1], [2, 1]) if LIES[name] == "forward" else ([3, 1], [1, 1], [2, 1])
            ]
            assert not verdict["findings"]
    assert {event["audit"] for event in events(runs, name, "dispute")} == {"refuted"}


@pytest.mark.parametrize("name", some(WITNESSES, IN_EVERY_RUN))
def test_whatever_a_witness_hands_in_the_run_goes_on_and_it_is_named(runs, name):
    for run in runs[name]:
        assert len(run.losses) == STEPS + MORE - RESUMED
        for verdict in attacked(run):
            assert verdict["excluded"] == [False, True, False]
            # What is no strike, because of conspicuous work before it, needs no audit and stays a finding.
            assert not any(finding["strikes"] for finding in verdict["findings"])
            for dispute in verdict["disputed"]:
                assert (dispute["audit"], dispute["at_fault"], dispute["about"]) == (WITNESSES[name], [1, 1], [2, 1])
        assert sum(bool(verdict["disputed"]) for verdict in attacked(run)) >= 3
        convicted = [worker for verdict in run.verdicts for worker in verdict["newly_convicted"]]
        # Silence may be the network's; a message other than it reported itself is proof.
        assert convicted == ([[1, 1]] if WITNESSES[name] == "false" else [])
    assert {(event["audit"], *event["at_fault"]) for event in events(runs, name, "dispute")} == {
        (WITNESSES[name], 1, 1)
    }


@pytest.mark.parametrize("name", some(ATTACKS, IN_EVERY_RUN))
def test_a_true_accusation_is_confirmed_and_convicts(runs, name):
    culprit = [ATTACKS[name]["stage"], 1]
    for run in runs[name]:
        convicted = [worker for verdict in run.verdicts for worker in verdict["newly_convicted"]]
        assert convicted == [culprit]
        assert attacked(run)[2]["newly_convicted"] == [culprit]
        assert all(verdict["excluded"] == [False, True, False] for verdict in attacked(run))
        assert not any(verdict["disputed"] for verdict in run.verdicts)
    told = [event for event in events(runs, name, "alarm") if [event["stage"], event["replica"]] == culprit]
    # From its conviction on no strike of it needs an audit.
    audited = [] if name in STANDS_ALONE else ["confirmed"] * 3
    assert [event["audit"] for event in told if event["audit"]] == audited
