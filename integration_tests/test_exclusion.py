"""P2: with a column excluded, training equals a run in which that column never existed."""

from __future__ import annotations

import math

import pytest
import torch

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.variants import some

IN_EVERY_RUN = ("fp32", "bf16_zero1")
BASE = Scenario(name="fp32", steps=5, optimizer="sgd", learning_rate=0.5, gradient_clipping=1.0)
# The mean over three columns with one masked adds the same numbers as the mean over two, rescaled by 3/2 in the
# gradient's own precision: equal up to rounding of that type.
TOLERANCE = {"fp32": 2e-6, "fp32_zero1": 2e-6, "tied": 2e-6, "bf16": 8e-3, "bf16_zero1": 8e-3, "fp16": 2e-3}
VARIANTS = [
    BASE,
    BASE.with_(name="tied", tied=True, steps=4),
    *(BASE.with_(name=name, precision=name, steps=4) for name in ("fp32_zero1", "bf16", "bf16_zero1", "fp16")),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, selected):
    wanted = [variant for variant in VARIANTS if variant is BASE or variant.name in selected("name")]
    folder = tmp_path_factory.mktemp("exclusion")
    fault = {"stage": 1, "replica": 2, "attack": "nan"}
    # A twin step trains on other data than the run that this one is compared with.
    block = {"enabled": True, "output_dir": str(folder / "sentinel"), "inject": [fault], "conviction": "statistics"}
    three = run_scenarios([v.with_(sentinel=block) for v in wanted], 3, 3, folder=folder / "three", timeout=200)
    two = run_scenarios(wanted, 3, 2, folder=folder / "two", timeout=200)
    return three, two


@pytest.mark.parametrize("name", some((variant.name for variant in VARIANTS), IN_EVERY_RUN))
def test_excluded_column_never_existed(runs, name):
    three, two = runs
    for stage in range(3):
        kept = two.at(name, stage, 0)
        for replica in range(3):
            run = three.at(name, stage, replica)
            assert all(verdict["excluded"] == [False, False, True] for verdict in run.verdicts)
            assert run.losses == pytest.approx(kept.losses, rel=TOLERANCE[name], abs=TOLERANCE[name])
            for parameter, weight in run.weights.items():
                assert torch.isfinite(weight).all(), f"NaN reached {parameter}"
                torch.testing.assert_close(
                    weight.float(),
                    kept.weights[parameter].float(),
                    rtol=TOLERANCE[name],
                    atol=TOLERANCE[name],
                )


def test_the_comparison_would_notice_the_third_column(runs):
    _, two = runs
    moved = [run.losses[0] - run.losses[-1] for run in two["fp32"]]
    assert all(change > 0.01 and math.isfinite(change) for change in moved)
