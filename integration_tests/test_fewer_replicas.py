"""After a conviction: what the run left says which machine to leave out, and without it the training goes on.

One replica fewer is another mesh. Replicated optimizer states load as they are; ZeRO's partitions are one a replica, so
the checkpoint goes through DeepSpeed's own conversion to a universal one.
"""

from __future__ import annotations

import json

import pytest
import torch

from integration_tests.harness import start_job
from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario
from integration_tests.variants import some

SAVED, STEPS = 4, 6
ROUNDS = {"stage": 1, "replica": 2, "attack": "low_precision", "start_step": 1}
SLOT = 5
CONVERT = "deepspeed.checkpoint.ds_to_universal"


@pytest.fixture(scope="module", params=some(["fp32", "fp32_zero1"], ["fp32_zero1"]))
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fewer")
    checkpoint = {"directory": str(folder / "checkpoint")}
    block = {"enabled": True, "output_dir": str(folder / "logs"), "warmup_steps": 2, "seed": 3}
    base = Scenario(name="three", precision=request.param, steps=SAVED)
    guarded = {**block, "twins": {"every": 1}, "inject": [ROUNDS]}
    three = run_scenarios(
        [base.with_(sentinel=guarded, save={**checkpoint, "after_step": SAVED})], 3, 3, folder=folder / "three"
    )
    settings = {}
    if request.param == "fp32_zero1":
        tag = (folder / "checkpoint" / "latest").read_text(encoding="utf-8").strip()
        source, target = folder / "checkpoint" / tag, folder / "checkpoint" / f"{tag}_universal"
        convert = [f"--input_folder={source}", f"--output_folder={target}"]
        convert += ["--num_extract_workers=1", "--num_merge_workers=1"]
        convert += ["--inject_missing_state"]  # asked for by checkpoints of any model but Megatron's
        with start_job(CONVERT, 1, 1, folder=folder / "convert", args=convert, module=True) as job:
            job.wait().check()
        (folder / "checkpoint" / "latest_universal").write_text(target.name, encoding="utf-8")
        settings = {"checkpoint": {"load_universal": True}}
    goes_on = base.with_(name="plain", steps=STEPS, load=checkpoint, config=settings)
    scenarios = [
        goes_on.with_(name="loaded", steps=SAVED),
        goes_on,
        goes_on.with_(name="guarded", sentinel={**block, "output_dir": str(folder / "after")}),
    ]
    return three, run_scenarios(scenarios, 3, 2, folder=folder / "two"), folder


def test_the_run_says_which_machine_to_leave_out(runs):
    _, _, folder = runs
    told = json.loads((folder / "logs" / "exclude.json").read_text())
    assert [(one["stage"], one["replica"], one["rank"], one["slot"]) for one in told["workers"]] == [(1, 2, 5, SLOT)]
    assert told["deepspeed"] == "--num_gpus=6", "of one host without GPUs, where slots are numbers of processes"
    assert (told["replicas_left"], told["processes"]) == (2, 6) and told["injected"] and told["workers"][0]["proved"]


def test_with_one_replica_fewer_it_starts_from_the_weights_that_it_had(runs):
    three, two, _ = runs
    for run in two["loaded"]:
        before = three.at("three", run.stage, 0).weights
        assert run.record["first_step"] == SAVED
        assert all(torch.equal(run.weights[name], before[name]) for name in before)


def test_and_goes_on_as_plain_deepspeed_would(runs):
    _, two, _ = runs
    for plain, guarded in zip(two["plain"], two["guarded"], strict=True):
        assert len(guarded.losses) == STEPS - SAVED and guarded.losses == plain.losses
        assert guarded.record["weights_sha256"] == plain.record["weights_sha256"]
        assert not any(map(any, guarded.verdicts[-1]["convicted"])), "who was bad is not here"
