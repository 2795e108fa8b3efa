"""P1: with no attack, a guarded run is bit-identical to plain DeepSpeed, and both ends of every link agree."""

from __future__ import annotations

import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario

JUDGED = Scenario(name="fp32", steps=10, micro_batches=4, hidden=64, lengths=(32,))
SHORT = JUDGED.with_(steps=4)
VARIANTS = [
    JUDGED,
    SHORT.with_(name="bf16_zero1", precision="bf16_zero1", steps=7),
    # Two things each, which MORE has one by one.
    SHORT.with_(name="fp16_zero1_dynamic", precision="fp16_zero1", dynamic_shape=True, lengths=(16, 24, 9)),
    SHORT.with_(
        name="tied_checkpointing",
        tied=True,
        gradient_clipping=1.0,
        activation_checkpoint_interval=1,
        layers_per_stage=2,
        evaluate_every=2,
    ),
]
MORE = [
    JUDGED.with_(name="ramped", hook="integration_tests.batch_size:ramp", steps=12),
    SHORT.with_(name="tied", tied=True, gradient_clipping=1.0),
    SHORT.with_(name="fp16_zero1", precision="fp16_zero1"),
    SHORT.with_(name="dynamic", dynamic_shape=True, lengths=(16, 24, 9)),
    SHORT.with_(name="checkpointing", activation_checkpoint_interval=1, layers_per_stage=2, evaluate_every=2),
    SHORT.with_(name="bf16", precision="bf16"),
    SHORT.with_(name="fp32_zero1", precision="fp32_zero1"),
    SHORT.with_(name="fp16", precision="fp16"),
    SHORT.with_(name="tied_bf16", precision="bf16", tied=True),
    SHORT.with_(name="int_mask", tuple_messages="int"),
    SHORT.with_(name="bool_mask", tuple_messages="bool"),
    SHORT.with_(name="cast_mask", tuple_messages="bool_cast"),
    SHORT.with_(name="float_part", tuple_messages="float", steps=12),
    SHORT.with_(name="reset_shape", reset_shape=True, lengths=(16, 24)),
    SHORT.with_(name="one_micro_batch", micro_batches=1),
]
NAMES = [
    *(variant.name for variant in VARIANTS),
    *(pytest.param(variant.name, marks=pytest.mark.long) for variant in MORE),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, selected):
    folder = tmp_path_factory.mktemp("identity")
    block = {"enabled": True, "output_dir": str(folder / "sentinel"), "warmup_steps": 3}
    wanted = [variant for variant in (*VARIANTS, *MORE) if variant in VARIANTS[:2] or variant.name in selected("name")]
    # A part that is learnt from zero grows in every step, which takes longer to be known.
    blocks = {plain.name: {**block, "warmup_steps": 10} if plain.name == "float_part" else block for plain in wanted}
    pairs = [(plain, plain.with_(name=f"guarded_{plain.name}", sentinel=blocks[plain.name])) for plain in wanted]
    scenarios = [scenario for pair in pairs for scenario in pair]
    return run_scenarios(scenarios, stages=2, replicas=3, folder=folder, timeout=500)


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_weights_are_bit_identical(runs, name):
    for plain, guarded in zip(runs[name], runs[f"guarded_{name}"], strict=True):
        assert guarded.record["watched"] and not plain.record["watched"]
        for key in (
            "losses",
            "evaluations",
            "weights_sha256",
            "masters_sha256",
            "global_steps",
            "skipped_steps",
        ):
            assert guarded.record[key] == plain.record[key], key


@pytest.mark.parametrize("name", NAMES)
def test_both_ends_report_the_same_and_all_ranks_judge_the_same(runs, name):
    everyone = [run.verdicts for run in runs[f"guarded_{name}"]]
    assert all(verdict["disputes"] == [] for verdict in everyone[0])
    assert all([v["digest"] for v in verdicts] == [v["digest"] for v in everyone[0]] for verdicts in everyone)


def test_the_long_runs_were_really_judged(runs):
    for name, least in (("fp32", 150), ("bf16_zero1", 90)):
        assert runs[f"guarded_{name}"][0].record["counts"]["judged_messages"] >= least
