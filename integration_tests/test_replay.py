"""One or two replicas: a step computed twice leaves nothing behind, and shows who miscalculates now and then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.variants import some

STEPS = 8
BASE = Scenario(name="base", steps=STEPS, micro_batches=4, hidden=32, lengths=(16,))
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16_zero1": {"precision": "bf16_zero1"},
    "bf16_zero1_bf16": {"precision": "bf16_zero1_bf16"},
    "fp16_zero1": {"precision": "fp16_zero1"},
    "tied": {"tied": True},
    "checkpointed": {"activation_checkpoint_interval": 1},
    "tuples": {"tuple_messages": "int"},
    "adapting": {"hook": "integration_tests.stateful:adapting"},
    "sparse": {"hook": "integration_tests.sparse:sparse", "optimizer": "sgd"},
}
IN_EVERY_RUN = ("fp32", "adapting")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, selected):
    folder = tmp_path_factory.mktemp("replay")

    def block(name: str) -> dict[str, Any]:
        more = {"seed": 3, "warmup_steps": 5, "twins": {"replay": 1}}
        return {"enabled": True, "output_dir": str(folder / name), **more}

    scenarios = []
    for kind in KINDS:
        if kind in selected("kind"):
            scenarios.append(BASE.with_(name=f"{kind}_plain", **KINDS[kind]))
            scenarios.append(BASE.with_(name=kind, sentinel=block(kind), **KINDS[kind]))
    scenarios.append(
        BASE.with_(name="transient", sentinel=block("transient"), hook="integration_tests.twin_faults:transient")
    )
    return run_scenarios(scenarios, stages=3, replicas=1, folder=folder, timeout=600)


@pytest.mark.parametrize("kind", some(KINDS, IN_EVERY_RUN))
def test_a_rehearsal_leaves_nothing_behind(runs, kind):
    for plain, guarded in zip(runs[f"{kind}_plain"], runs[kind], strict=True):
        assert guarded.error is None, guarded.error
        assert guarded.losses == plain.losses
        assert all(torch.equal(plain.weights[name], guarded.weights[name]) for name in plain.weights)
        assert not any(any(verdict["excluded"]) or verdict["newly_convicted"] for verdict in guarded.verdicts)


def test_who_computes_something_else_the_second_time_is_proved_and_the_step_is_not_applied(runs):
    for run in runs["transient"]:
        assert run.error is None, run.error
        odd = [verdict for verdict in run.verdicts if verdict["newly_convicted"]]
        assert [(verdict["step"], verdict["newly_convicted"], verdict["skip"]) for verdict in odd] == [
            (6, [[1, 0]], True)
        ]
