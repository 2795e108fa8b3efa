"""Columns dealt anew: training goes on around bad workers, and who serves a column changes nothing of what is learnt."""

from __future__ import annotations

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.variants import some

BASE = Scenario(name="fp32", steps=12, hidden=64, lengths=(32,), evaluate_every=4)
SHORT = BASE.with_(steps=6)
VARIANTS = [
    BASE,
    SHORT.with_(name="dynamic", dynamic_shape=True, lengths=(16, 24, 9)),
    SHORT.with_(name="int_mask", tuple_messages="int"),
    SHORT.with_(name="tied", tied=True, gradient_clipping=1.0),
    SHORT.with_(name="bf16", precision="bf16"),
    SHORT.with_(name="bf16_zero1", precision="bf16_zero1"),
    SHORT.with_(name="fp32_zero1", precision="fp32_zero1"),
    SHORT.with_(name="checkpointing", activation_checkpoint_interval=1, layers_per_stage=2),
]
IN_EVERY_RUN = ("fp32", "dynamic")
STAGES, REPLICAS = 4, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory, selected):
    folder = tmp_path_factory.mktemp("wiring")
    block = {"enabled": True, "output_dir": str(folder / "logs"), "warmup_steps": 4, "wiring": "shuffle"}
    wanted = [variant for variant in VARIANTS if variant is BASE or variant.name in selected("name")]
    pairs = [(plain, plain.with_(name=f"shuffled_{plain.name}", sentinel=block)) for plain in wanted]
    return run_scenarios([one for pair in pairs for one in pair], STAGES, REPLICAS, folder=folder, timeout=500)


@pytest.mark.parametrize("name", some((variant.name for variant in VARIANTS), IN_EVERY_RUN))
def test_who_serves_a_column_changes_no_loss_and_no_weight(runs, name):
    for plain, shuffled in zip(runs[name], runs[f"shuffled_{name}"], strict=True):
        for key in ("losses", "evaluations", "weights_sha256", "masters_sha256", "skipped_steps"):
            assert shuffled.record[key] == plain.record[key], key
    verdicts = runs[f"shuffled_{name}"][0].verdicts
    assert all(not one["disputed"] and not one["findings"] for one in verdicts)
