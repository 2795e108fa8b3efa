"""P2: what an excluded message left in the buffers of those behind it is undone, and nobody is struck for it."""

from __future__ import annotations

import math

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario

START, STEPS = 6, 10
BASE = Scenario(name="plain", steps=STEPS, hidden=64, lengths=(32,), evaluate_every=3)
KINDS = {"running_maximum": {"attack": "constant", "value": 1e4}, "batch_norm": {"attack": "nan"}}
NAMES = ["batch_norm", pytest.param("running_maximum", marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, selected):
    folder = tmp_path_factory.mktemp("forward_state")
    block = {"enabled": True, "output_dir": str(folder / "logs"), "seed": 0, "warmup_steps": 4}
    scenarios = []
    for kind in sorted(selected("kind")):
        attack = KINDS[kind]
        fault = {"stage": 1, "replica": 1, "start_step": START, "stop_step": START + 1, **attack}
        honest = BASE.with_(name=f"plain_{kind}", hook=f"integration_tests.stateful:{kind}")
        scenarios += [honest, honest.with_(name=f"guarded_{kind}", sentinel=block)]
        scenarios.append(honest.with_(name=f"attacked_{kind}", sentinel={**block, "inject": [fault]}))
    return run_scenarios(scenarios, stages=3, replicas=2, folder=folder, timeout=400)


@pytest.mark.parametrize("kind", NAMES)
def test_keeping_buffers_changes_nothing(runs, kind):
    for plain, guarded in zip(runs[f"plain_{kind}"], runs[f"guarded_{kind}"], strict=True):
        for key in ("losses", "evaluations", "weights_sha256", "buffers_sha256"):
            assert guarded.record[key] == plain.record[key], key


@pytest.mark.parametrize("kind", NAMES)
def test_one_bad_message_leaves_nothing_behind(runs, kind):
    honest, attacked = runs[f"plain_{kind}"], runs[f"attacked_{kind}"]
    verdicts = attacked[0].verdicts
    assert [finding["worker"] for finding in verdicts[START]["findings"]] == [[1, 1]]
    assert verdicts[START]["excluded"] == [False, True]
    for verdict in verdicts[START + 1 :]:
        assert not verdict["findings"] and not verdict["excluded"][0] and not verdict["newly_convicted"]
    for mine, clean in zip(attacked, honest, strict=True):
        assert 0 < mine.record["buffers_largest"] < 2 * clean.record["buffers_largest"], "NaN is not less either"
        for step, loss in mine.record["evaluations"].items():
            assert math.isclose(float.fromhex(loss), float.fromhex(clean.record["evaluations"][step]), rel_tol=0.02)


@pytest.fixture(scope="module")
def three(tmp_path_factory, selected):
    folder = tmp_path_factory.mktemp("three_replicas")
    constant = {"stage": 1, "attack": "constant", "value": 1e4}
    scenarios = []
    for name, fault, every in (("annealed", constant, 0), ("running_maximum", {"stage": 0, "attack": "nan"}, 2)):
        if name not in selected("name"):
            continue
        inject = [{"replica": 1, "start_step": START, "stop_step": START + 1, **fault}]
        block = {"enabled": True, "output_dir": str(folder / name), "seed": 4, "warmup_steps": 4, "inject": inject}
        block["twins"] = {"every": every}  # and on suspicion
        hook = f"integration_tests.stateful:{name}"
        scenarios.append(BASE.with_(name=name, hook=hook, sentinel=block, steps=START + 7, evaluate_every=0))
    return run_scenarios(scenarios, stages=3, replicas=3, folder=folder, timeout=400)


@pytest.mark.parametrize("name", ["annealed", pytest.param("running_maximum", marks=pytest.mark.long)])
def test_twin_steps_prove_no_worker_whose_state_is_another_than_the_others(three, name):
    """One was left out for what its neighbour did, and is given the others' state; or each has one of its own."""
    verdicts = three[name][0].verdicts
    assert verdicts[START]["excluded"] == [False, True, False]
    twins = [verdict for verdict in verdicts[START + 1 :] if verdict["twins"]]
    assert twins
    for verdict in verdicts:
        honest = [proof for proof in verdict["proofs"] if verdict["step"] != START]
        assert not honest and not verdict["differences"] and not verdict["newly_convicted"]
    for verdict in verdicts[START + 1 :]:
        assert not any(verdict["excluded"])
    if name == "annealed":
        assert all(all(verdict["alike"]) for verdict in twins), "all make the same of the same"
        assert len({run.record["buffers_sha256"] for run in three[name][3:6]}) == 1
