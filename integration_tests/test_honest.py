"""Honest training on data that are sorted by kind and cut into one shard a replica convicts nobody."""

from __future__ import annotations

import math

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario

CROSSINGS, STEPS = (52, 44, 36), 70


@pytest.mark.long
def test_replicas_that_cross_to_another_kind_of_text_one_after_the_other(tmp_path):
    block = {"enabled": True, "output_dir": str(tmp_path / "logs"), "seed": 1}
    scenario = Scenario(
        name="sorted",
        sentinel=block,
        steps=STEPS,
        micro_batches=2,
        micro_batch_size=4,
        lengths=(64,),
        layers_per_stage=2,
        learning_rate=2e-3,
        other_text_from=CROSSINGS,
    )
    run = run_scenarios([scenario], stages=3, replicas=3, folder=tmp_path, timeout=400)["sorted"][0]
    assert not any(verdict["newly_convicted"] for verdict in run.verdicts)
    lost = sum(sum(verdict["excluded"]) for verdict in run.verdicts)
    assert lost < 0.05 * 3 * STEPS
    assert all(math.isfinite(loss) for loss in run.losses)
