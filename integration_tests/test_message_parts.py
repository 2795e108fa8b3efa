"""A message is all its tensors: images, two float tensors, ids that are handed on, and gradients that carry nothing."""

from __future__ import annotations

import numpy as np
import pytest

from integration_tests.harness import ROOT
from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.variants import some

STEPS, START, WARM_UP = 9, 7, 5
# What these carry spreads more, or is of two sizes, each with what is learnt of it: their fences come later.
LATER = {"images": 17, "unlabelled": 5}
ROLL = f"{ROOT / 'integration_tests' / 'attacks_on_parts.py'}:Roll"
BASE = Scenario(name="", models="integration_tests.models_of_parts", steps=STEPS, hidden=16)
HONEST = [
    BASE.with_(name="images", kind="images", lengths=(16, 24), reset_shape=True, steps=STEPS + 18),
    BASE.with_(name="dynamic_images", kind="images", lengths=(16, 12, 24), dynamic_shape=True, steps=4),
    BASE.with_(name="mask_first", kind="mask_first"),
    BASE.with_(name="unlabelled", kind="unlabelled", steps=STEPS + 6),
    BASE.with_(name="carried", kind="carried"),
]
CULPRIT = [1, 1]
ATTACKS = {
    "ids_rolled": ("carried", {"attack": ROLL, "tensor": 1}),
    "count_rolled": ("carried", {"attack": "constant", "value": 3.0, "tensor": 2}),
    "hidden_behind_a_mask": ("mask_first", {"attack": "matched_random"}),
    "image_shuffled": ("images", {"attack": "matched_random"}),
    "gradient_of_nothing": ("unlabelled", {"attack": "random_value", "std": 0.01, "direction": "backward"}),
}
IN_EVERY_RUN = ("mask_first", "carried", "ids_rolled", "hidden_behind_a_mask")


def start_of(kind):
    """The step after which a kind's honest run is saved, and its attacks begin."""
    return START + LATER.get(kind, 0)


@pytest.fixture(scope="module")
def wanted(selected):
    attacks = [name for name in ATTACKS if name in selected("name")]
    kinds = {"mask_first", *selected("name"), *(ATTACKS[name][0] for name in attacks)}
    return [scenario for scenario in HONEST if scenario.name in kinds], attacks


@pytest.fixture(scope="module")
def runs(tmp_path_factory, wanted):
    folder = tmp_path_factory.mktemp("parts")
    block = {"enabled": True, "output_dir": str(folder / "sentinel"), "seed": 0, "warmup_steps": WARM_UP}
    longer = {**block, "warmup_steps": WARM_UP + 3}
    by_name = {scenario.name: scenario for scenario in HONEST}
    scenarios = []
    blocks = {plain.name: block if start_of(plain.name) == START else longer for plain in HONEST}
    for plain in wanted[0]:
        start = start_of(plain.name)
        saved = {"directory": str(folder / plain.name), "after_step": start} if plain.steps > start else None
        guarded = plain.with_(name=f"guarded_{plain.name}", sentinel=blocks[plain.name], save=saved)
        scenarios += [plain, guarded]
    for name in wanted[1]:
        kind, attack = ATTACKS[name]
        fault = {"stage": CULPRIT[0], "replica": CULPRIT[1], "start_step": start_of(kind), **attack}
        honest = {"directory": str(folder / kind)}
        scenarios.append(by_name[kind].with_(name=name, sentinel={**blocks[kind], "inject": [fault]}, load=honest))
    two_parts = {"sentinel": block, "steps": START + 2, "load": {"directory": str(folder / "mask_first")}}
    scenarios.append(by_name["unlabelled"].with_(name="one_part", **two_parts))
    scenarios.append(by_name["mask_first"].with_(name="two_again", **two_parts))
    return run_scenarios(scenarios, stages=3, replicas=2, folder=folder, timeout=400)


@pytest.mark.parametrize("name", some((scenario.name for scenario in HONEST), IN_EVERY_RUN))
def test_honest_runs_are_bit_identical_and_nobody_is_accused(runs, name):
    for plain, guarded in zip(runs[name], runs[f"guarded_{name}"], strict=True):
        assert guarded.record["losses"] == plain.record["losses"]
        assert guarded.record["weights_sha256"] == plain.record["weights_sha256"]
        for verdict in guarded.verdicts:
            assert not verdict["findings"] and not verdict["disputed"] and not any(verdict["excluded"])


@pytest.mark.parametrize("name", some(ATTACKS, IN_EVERY_RUN))
def test_who_alters_any_tensor_of_a_message_is_named_and_nobody_else(runs, name):
    run = runs[name][0]
    found = [finding for verdict in run.verdicts for finding in verdict["findings"]]
    assert found and {tuple(finding["worker"]) for finding in found} == {tuple(CULPRIT)}
    assert run.verdicts[0]["step"] == start_of(ATTACKS[name][0]) and run.verdicts[0]["findings"]
    expected = {
        "ids_rolled": {"passed_on"},
        "count_rolled": {"passed_on"},
        "gradient_of_nothing": {"from_nothing"},
    }.get(name)
    if expected:
        assert expected <= {finding["statistic"] for finding in found}
    if name == "hidden_behind_a_mask":
        assert {finding["part"] for finding in found} == {1}


def test_all_ranks_judge_the_same(runs, wanted):
    for name in (*wanted[1], *(f"guarded_{scenario.name}" for scenario in wanted[0])):
        digests = np.array([[verdict["digest"] for verdict in run.verdicts] for run in runs[name]])
        assert (digests == digests[0]).all(), name


def test_a_state_of_another_number_of_parts_starts_anew(runs):
    said = "messages have 1 judged parts, and the state taken over is of 2: fences and convictions start anew"
    assert (runs.job.stdout[0] + runs.job.stderr[0]).count(said) == 1
    for name in ("one_part", "two_again"):
        assert [verdict["step"] for verdict in runs[name][0].verdicts] == [START, START + 1]
        assert not any(verdict["findings"] or verdict["disputed"] for verdict in runs[name][0].verdicts)


def test_what_is_not_judged_is_said_once(runs, wanted):
    said = "messages from link 0 on: not judged are tensor 1 (int64[2, 24]), tensor 2 (int64[1])"
    told = [out + err for out, err in zip(runs.job.stdout, runs.job.stderr, strict=True)]
    carried = 1 + sum(ATTACKS[name][0] == "carried" for name in wanted[1])  # runs of that kind that are guarded
    assert [text.count(said) for text in told] == [carried, 0, 0, 0, 0, 0]
