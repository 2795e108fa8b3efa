"""Injected faults in live runs: found, rightly blamed, kept out; liars take out themselves alone."""

from __future__ import annotations

import json
import math
import socket

import pytest
import torch

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.variants import some

# One clean run warms up for all: the others go on from its checkpoint.
RESUMED, START, STEPS = 6, 7, 10
LATER = {"forward_delay": 3}  # it has to have messages that old, and fences that are no longer those of the beginning
BASE = Scenario(name="base", steps=STEPS, hidden=64, lengths=(48,))
CULPRIT = [1, 2]
SEEN = {
    "forward_constant": {"attack": "constant"},
    "forward_random_value": {"attack": "random_value", "std": 1.0},
    "forward_scaling": {"attack": "scaling", "factor": -1},
    "forward_random_sign": {"attack": "random_sign", "rate": 0.5},
    "forward_bias": {"attack": "bias", "size": 2.0},
    "forward_nan": {"attack": "nan", "rate": 0.0},
    "forward_pass_through": {"attack": "pass_through"},
    "forward_delay": {"attack": "delay", "steps": 3},
    "backward_constant": {"attack": "constant"},
    "backward_replay": {"attack": "replay"},
    "backward_random_value": {"attack": "random_value", "std": 0.1},
    "backward_scaling": {"attack": "scaling", "factor": 20.0},
    "backward_bias": {"attack": "bias", "size": 2.0},
    "backward_nan": {"attack": "nan"},
    # What no single message shows: only the pair of what entered the stage and what left it.
    "backward_flip": {"attack": "scaling", "factor": -1.0},
    "backward_delay": {"attack": "delay", "steps": 1},
    "forward_shuffle": {"attack": "token_shuffle"},
    "forward_matched": {"attack": "matched_random"},
}
DISPUTED = {
    "transit_bit_flip": {"attack": "bit_flip", "where": "transit"},
    "transit_backward": {"attack": "scaling", "factor": 1.01, "where": "transit", "direction": "backward"},
    "report_forward": {"attack": "random_value", "where": "report"},
    "report_backward": {"attack": "scaling", "factor": -1, "where": "report", "direction": "backward"},
}
SHORTLY = {
    *("forward_constant", "backward_flip"),
    *("transit_backward", "report_forward"),
}
ENDS = {  # link, sender, receiver of the disputed messages
    "transit_bit_flip": (1, [1, 2], [2, 2]),
    "transit_backward": (0, [1, 2], [0, 2]),
    "report_forward": (0, [0, 2], [1, 2]),
    "report_backward": (1, [2, 2], [1, 2]),
}


def start_of(name: str) -> int:
    return START + LATER.get(name, 0)


def scenario(name: str, fault: dict, folder) -> Scenario:
    """From the clean run's checkpoint on, with a fault from START on."""
    direction = "backward" if name.startswith("backward") else "forward"
    inject = {"stage": 1, "replica": 2, "direction": direction, "start_step": start_of(name), **fault}
    block = {
        "enabled": True,
        "conviction": "statistics",
        "warmup_steps": 4,
        "wiring": "static",  # a link at fault is a link of two workers, as long as they stay neighbours
        "output_dir": str(folder / f"logs_{name}"),
        "events": "steps",
        "inject": [inject],
    }
    steps = STEPS + LATER.get(name, 0)
    return BASE.with_(name=name, steps=steps, sentinel=block, load={"directory": str(folder / "clean")})


@pytest.fixture(scope="module")
def wanted(selected):
    return selected("name") | {"forward_constant"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, wanted):
    folder = tmp_path_factory.mktemp("faults")
    scenarios = [scenario(name, fault, folder) for name, fault in {**SEEN, **DISPUTED}.items() if name in wanted]
    clean = BASE.with_(
        name="clean",
        steps=17,
        sentinel={"enabled": True, "output_dir": str(folder / "logs_clean"), "warmup_steps": 4},
        save={"directory": str(folder / "clean"), "after_step": RESUMED},
    )
    return run_scenarios([clean, *scenarios], stages=3, replicas=3, folder=folder, timeout=420)


def attacked(runs, name):
    return [verdict for verdict in runs[name][0].verdicts if verdict["step"] >= start_of(name)]


@pytest.mark.parametrize("name", some(SEEN, SHORTLY))
def test_a_tampering_worker_is_found_excluded_and_convicted(runs, name):
    seen = attacked(runs, name)
    assert seen[0]["findings"], "not found in the step in which it began"
    for verdict in seen:
        assert verdict["excluded"][2], verdict["step"]
        assert CULPRIT in [finding["worker"] for finding in verdict["findings"]], verdict["step"]
    assert seen[2]["newly_convicted"] == [CULPRIT]
    convicted = [worker for verdict in runs[name][0].verdicts for worker in verdict["newly_convicted"]]
    assert convicted == [CULPRIT]


@pytest.mark.parametrize("name", some([*SEEN, *DISPUTED], SHORTLY))
def test_weights_and_losses_stay_finite(runs, name):
    for run in runs[name]:
        assert all(math.isfinite(loss) for loss in run.losses)
        assert all(torch.isfinite(weight).all() for weight in run.weights.values())


@pytest.mark.parametrize("name", some(DISPUTED, SHORTLY))
def test_a_disputed_link_excludes_its_column_and_convicts_nobody(runs, name):
    link, sender, receiver = ENDS[name]
    for verdict in attacked(runs, name):
        assert verdict["excluded"] == [False, False, True]
        assert [(d["link"], d["sender"], d["receiver"]) for d in verdict["disputed"]] == [(link, sender, receiver)]
    assert not any(verdict["newly_convicted"] for verdict in runs[name][0].verdicts)


def test_no_false_conviction_and_few_false_alarms_in_clean_traffic(runs):
    run = runs["clean"][0]
    judged = run.record["counts"]["judged_messages"]
    assert judged >= 300
    assert run.record["counts"]["alarms"] < 0.01 * judged
    assert not any(verdict["newly_convicted"] or verdict["disputed"] for verdict in run.verdicts)


def test_before_the_attack_nobody_is_convicted_or_disputed(runs, wanted):
    for name in wanted:
        before = [verdict for verdict in runs[name][0].verdicts if verdict["step"] < start_of(name)]
        assert len(before) == start_of(name) - RESUMED and not any(verdict["warming_up"] for verdict in before)
        assert not any(verdict["newly_convicted"] or verdict["disputed"] for verdict in before)


def test_events_tell_it(runs):
    folder = runs.job.folder / "logs_forward_constant"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[0]["kind"] == "start" and events[0]["injecting"]
    assert events[0]["mesh"] == {"stages": 3, "replicas": 3}
    assert sum(event["kind"] == "step" for event in events) == STEPS - RESUMED
    (conviction,) = [event for event in events if event["kind"] == "conviction"]
    assert (conviction["stage"], conviction["replica"], conviction["step"]) == (1, 2, START + 2)
    host = socket.gethostname()
    (who,) = conviction["who"]
    assert (who["rank"], who["local_rank"], who["host"], who["device"], who["gpu"]) == (5, 5, host, "cpu", None)
    assert {event["run_id"] for event in events} == {events[0]["run_id"]} and len(events[0]["run_id"]) == 16
    assert events[-1]["kind"] == "end" and events[-1]["convicted"] == [[1, 2]]
    (health,) = map(json.loads, (folder / "health.jsonl").read_text().splitlines())
    assert health["nodeName"] == host and health["metadata"]["run_id"] == events[0]["run_id"]
    assert conviction["why"] in health["message"] and not health["isHealthy"]


def test_injection_shouts(runs):
    assert "FAULT INJECTION IS ON" in runs.job.stderr[0] + runs.job.stdout[0]
