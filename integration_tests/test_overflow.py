"""fp16 with dynamic loss scaling, live: its search is left alone, and where no column is left the scale comes down."""

from __future__ import annotations

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario

START, STEPS = 22, 25
# The scale begins far too high: the first steps overflow, and it has come down to the limit when the attack begins.
BASE = Scenario(
    name="plain",
    precision="fp16_zero1",
    steps=STEPS,
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
    block = {"enabled": True, "output_dir": str(folder / "logs")}
    scenarios = [
        BASE,
        BASE.with_(name="guarded", sentinel=block),
        BASE.with_(name="attacked", sentinel={**block, "inject": FAULTS}),
    ]
    return run_scenarios(scenarios, stages=3, replicas=2, folder=folder, timeout=200)


def test_the_search_for_the_scale_is_that_of_plain_deepspeed(runs):
    for plain, guarded in zip(runs["plain"], runs["guarded"], strict=True):
        for key in ("losses", "loss_scale", "skipped_steps", "global_steps", "weights_sha256", "masters_sha256"):
            assert guarded.record[key] == plain.record[key], key
        assert plain.record["skipped_steps"] >= 3, "else nothing was searched for"
        assert not any(verdict["findings"] for verdict in guarded.verdicts)


def test_where_overflow_leaves_no_column_the_scale_comes_down(runs):
    for plain, attacked in zip(runs["plain"], runs["attacked"], strict=True):
        for verdict in attacked.verdicts[START:]:
            assert verdict["skip"] and verdict["overflow"] and not verdict["newly_convicted"]
            assert verdict["findings"] and not any(finding["strikes"] for finding in verdict["findings"])
        skipped = STEPS - START
        assert attacked.record["skipped_steps"] == plain.record["skipped_steps"] + skipped
        assert attacked.record["loss_scale"] == plain.record["loss_scale"] / 2**skipped
