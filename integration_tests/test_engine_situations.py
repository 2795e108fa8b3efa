"""The situations of DeepSpeed's own pipeline tests, guarded and unguarded, equal to the bit.

Gradients scaled and averaged in the ways that the config offers, activation checkpointing of both kinds, checkpoints of
tied and ZeRO-1 runs taken up again, convolutions. ``test_identity`` has the precisions and the shapes of messages.
"""

from __future__ import annotations

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.variants import some

BASE = Scenario(name="", steps=3)
SITUATIONS = [
    BASE.with_(name="prescaled", config={"prescale_gradients": True, "gradient_predivide_factor": 2.0}),
    BASE.with_(name="fp16_static_scale", precision="fp16", config={"fp16": {"enabled": True, "loss_scale": 128}}),
    BASE.with_(name="fp16_communicates_fp32", precision="fp16", config={"communication_data_type": "fp32"}),
    BASE.with_(name="clipped", gradient_clipping=0.1, optimizer="sgd", learning_rate=0.1),
    BASE.with_(
        name="reentrant",
        activation_checkpoint_interval=1,
        layers_per_stage=2,
        config={"pipeline": {"use_reentrant": True}},
    ),
    BASE.with_(
        name="not_reentrant",
        activation_checkpoint_interval=1,
        layers_per_stage=2,
        config={"pipeline": {"use_reentrant": False}},
    ),
    BASE.with_(name="not_reentrant_ids", tuple_messages="int", config={"pipeline": {"use_reentrant": False}}),
    BASE.with_(
        name="convolutions", models="integration_tests.models_of_parts", kind="images", lengths=(16,), hidden=16
    ),
]
SAVED_AFTER = 2
IN_EVERY_RUN = ("prescaled", "saved_tied_zero1")
RESUMED = [
    BASE.with_(name="saved_tied", tied=True),
    BASE.with_(name="saved_zero1", precision="bf16_zero1"),
    BASE.with_(name="saved_tied_zero1", precision="fp32_zero1", tied=True),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, selected):
    wanted = selected("name")
    folder = tmp_path_factory.mktemp("situations")
    block = {"enabled": True, "output_dir": str(folder / "sentinel")}
    scenarios = []
    for plain in (one for one in SITUATIONS if one.name in wanted):
        scenarios += [plain, plain.with_(name=f"guarded_{plain.name}", sentinel=block)]
    for plain in (one for one in RESUMED if one.name in wanted):
        for whole in (plain, plain.with_(name=f"guarded_{plain.name}", sentinel=block)):
            saved = {"directory": str(folder / whole.name)}
            scenarios.append(whole.with_(save={**saved, "after_step": SAVED_AFTER}))
            scenarios.append(whole.with_(name=f"{whole.name}_resumed", load=saved))
    return run_scenarios(scenarios, stages=3, replicas=2, folder=folder, timeout=400)


def equal(some, others):
    for one, other in zip(some, others, strict=True):
        assert len(one.losses) == len(other.losses) > 0
        for key in ("losses", "weights_sha256", "masters_sha256", "global_steps", "skipped_steps"):
            assert one.record[key] == other.record[key], key


@pytest.mark.parametrize("name", some((one.name for one in SITUATIONS), IN_EVERY_RUN))
def test_guarded_and_unguarded_are_equal_to_the_bit(runs, name):
    equal(runs[name], runs[f"guarded_{name}"])
    for run in runs[f"guarded_{name}"]:
        assert run.record["watched"] and len(run.verdicts) == BASE.steps
        assert all(verdict["disputes"] == [] for verdict in run.verdicts)


@pytest.mark.parametrize("name", some((one.name for one in RESUMED), IN_EVERY_RUN))
def test_what_was_saved_goes_on_as_it_would_have_without_a_guard(runs, name):
    equal(runs[name], runs[f"guarded_{name}"])
    equal(runs[f"{name}_resumed"], runs[f"guarded_{name}_resumed"])
    for whole, resumed in zip(runs[name], runs[f"guarded_{name}_resumed"], strict=True):
        assert resumed.record["first_step"] == SAVED_AFTER
        assert resumed.record["weights_sha256"] == whole.record["weights_sha256"]
