"""Whoever tries to have blame fall on honest workers, and data sorted by kind: twin steps convict the culprit alone.

4 x 3, so that the bad worker has an honest one behind it whose work is judged too.
"""

from __future__ import annotations

from typing import Any

import pytest

from integration_tests.harness import ROOT
from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.test_twins import of_twins

pytestmark = pytest.mark.long
STEPS, START = 30, 14  # twin steps do not count for the warm-up of 8
BASE = Scenario(name="", steps=STEPS, hidden=32, lengths=(16,))
CULPRIT = [1, 1]
ROLL = f"{ROOT / 'integration_tests' / 'attacks_on_parts.py'}:Roll"
# What the culprit does from START on, and on which model. What it sends is wrong in ALTERS and AMONG_OTHERS. In SAYS it
# is what it says of messages, which no twin step can prove.
ALTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "position_ids": (
        {"attack": ROLL, "tensor": 1},
        {"models": "integration_tests.models_of_parts", "kind": "carried", "hidden": 16},
    ),
    "counts_behind": ({"attack": "constant", "value": 1e4}, {"hook": "integration_tests.stateful:annealed"}),
    "just_inside_the_fences": ({"attack": "scaling", "factor": 1.02}, {}),
    "stale": ({"attack": "delay", "steps": 3}, {}),
}
# Each replica's state follows its own data, so as long as these differ twin steps compare nothing and strikes convict.
AMONG_OTHERS = {
    "buffers_behind": ({"attack": "constant", "value": 1e4}, {"hook": "integration_tests.stateful:running_maximum"})
}
SAYS: dict[str, dict[str, Any]] = {
    "sketches": {"where": "sketch", "attack": "scaling", "factor": -1},
    "sketches_backward": {"where": "sketch", "attack": "scaling", "factor": -1, "direction": "backward"},
    "reports": {"where": "report", "attack": "framing"},
}
# From which step on each replica has text of another kind.
DATA = {"by_kind": (0, STEPS, STEPS), "crossing": (24, 20, 16)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, selected):
    folder = tmp_path_factory.mktemp("framing")
    block = {"enabled": True, "seed": 3, "warmup_steps": 8, "twins": {"every": 4}}
    scenarios = []
    faults = ALTERS | AMONG_OTHERS | {name: (fault, {}) for name, fault in SAYS.items()}
    for name, (fault, model) in faults.items():
        if name not in selected("name"):
            continue
        inject = [{"stage": CULPRIT[0], "replica": CULPRIT[1], "start_step": START, **fault}]
        guarded = {**block, "output_dir": str(folder / f"logs_{name}"), "inject": inject}
        scenarios.append(BASE.with_(name=name, sentinel=guarded, **model))
    for name in DATA:
        if name in selected("data"):
            guarded = {**block, "output_dir": str(folder / f"logs_{name}")}
            scenarios.append(BASE.with_(name=name, sentinel=guarded, lengths=(64,), other_text_from=DATA[name]))
    return run_scenarios(scenarios, stages=4, replicas=3, folder=folder, timeout=900)


def convicted(run):
    return [worker for verdict in run.verdicts for worker in verdict["newly_convicted"]]


@pytest.mark.parametrize("name", ALTERS)
def test_who_alters_what_it_sends_is_proved_where_it_first_acts_in_a_twin_step(runs, name):
    for run in runs[name]:
        assert run.error is None, run.error
        acted = next(verdict for verdict in of_twins(run) if verdict["step"] >= START)
        assert acted["proofs"] and acted["newly_convicted"] == [CULPRIT]
        assert convicted(run) == [CULPRIT]
        assert all(proof == CULPRIT for verdict in run.verdicts for proof in verdict["proofs"])


@pytest.mark.parametrize("name", AMONG_OTHERS)
def test_who_spoils_the_buffers_of_those_behind_it_is_convicted_alone(runs, name):
    for run in runs[name]:
        assert run.error is None, run.error
        assert not run.verdicts[START]["warming_up"] and run.verdicts[START]["findings"]
        assert convicted(run) == [CULPRIT]
        assert all(proof == CULPRIT for verdict in run.verdicts for proof in verdict["proofs"])


@pytest.mark.parametrize("name", SAYS)
def test_who_says_other_things_of_messages_than_are_true_has_nobody_else_convicted(runs, name):
    for run in runs[name]:
        assert run.error is None, run.error
        assert len([verdict for verdict in of_twins(run) if verdict["step"] >= START]) >= 2
        assert not any(verdict["proofs"] for verdict in run.verdicts)
        assert convicted(run) in ([], [CULPRIT])


@pytest.mark.parametrize("data", DATA)
def test_data_sorted_by_kind_prove_and_convict_nobody(runs, data):
    for run in runs[data]:
        assert run.error is None, run.error
        assert len(of_twins(run)) >= 4
        for verdict in run.verdicts:
            assert not (verdict["proofs"] or verdict["differences"] or verdict["newly_convicted"])
