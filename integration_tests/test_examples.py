"""The examples run as they are; hf_trainer.py also shows that the Trainer runs under torchrun and accelerate."""

from __future__ import annotations

import argparse
import ast
import time

import pytest
from transformers import AutoModelForCausalLM

from integration_tests.harness import run_job, start_job

# One file: each process learns a tokenizer from the text, which takes seconds of it all.
TEXT = f"--text={argparse.__file__}"


@pytest.mark.parametrize(
    ("launcher", "replicas"),
    [
        pytest.param("bare", 1, marks=pytest.mark.long),
        pytest.param("torchrun", 1, marks=pytest.mark.long),
        pytest.param("torchrun", 3, marks=pytest.mark.long),
        pytest.param("accelerate", 3, marks=pytest.mark.long),
    ],
)
def test_the_trainer_example_trains_and_saves(tmp_path, launcher, replicas):
    quick = [TEXT, "--max_steps=3", "--logging_steps=1", "--eval_steps=3", "--disable_tqdm=True"]
    job = run_job(
        "examples/hf_trainer.py",
        stages=3,
        replicas=replicas,
        folder=tmp_path / "job",
        args=[f"--output_dir={tmp_path / 'out'}", *quick],
        launcher=launcher,
        timeout=300,
    ).check()
    check(job, tmp_path / "out")


def check(job, saved):
    assert "'eval_loss'" in job.stdout[0]
    assert "sentinel/alarms" in job.stdout[0]
    AutoModelForCausalLM.from_pretrained(saved)


def losses(text):
    """Loss by epoch, as the Trainer prints them."""
    lines = [ast.literal_eval(line) for line in text.splitlines() if line.startswith("{'loss'")]
    return {line["epoch"]: line["loss"] for line in lines}


def test_a_killed_run_goes_on_from_its_last_checkpoint_as_if_nothing_had_happened(tmp_path):
    script, out = "examples/hf_trainer.py", tmp_path / "out"
    args = [
        f"--output_dir={out}",
        TEXT,
        "--max_steps=6",
        "--logging_steps=1",
        "--eval_steps=6",
        "--disable_tqdm=True",
    ]
    args += ["--save_strategy=steps", "--save_steps=2", "--save_total_limit=1", "--stages=2"]
    with start_job(script, 2, 1, folder=tmp_path / "killed", args=args) as job:
        deadline = time.monotonic() + 300
        while len(losses(job.log(0))) < 3:  # the checkpoint of step 2 is written, that of step 4 is not
            assert time.monotonic() < deadline, job.log(0, "stderr")[-2000:]
            time.sleep(0.02)
        job.kill(1)
        job.stop()
        before = losses(job.log(0))
    checkpoint = sorted(out.glob("checkpoint-*"))[0]
    job = run_job(
        script,
        2,
        1,
        folder=tmp_path / "resumed",
        args=[*args, f"--resume_from_checkpoint={checkpoint}"],
        timeout=300,
    ).check()
    after = losses(job.stdout[0])
    both = sorted(before.keys() & after.keys())
    assert both and [after[epoch] for epoch in both] == [before[epoch] for epoch in both]
    assert len(before.keys() | after.keys()) == 6
    check(job, out)


def test_the_native_example_learns(tmp_path):
    args = [tmp_path / "out"]
    job = run_job("examples/deepspeed_native.py", 3, 1, folder=tmp_path / "job", args=args, timeout=300).check()
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in job.stdout[0].splitlines() if "loss " in line]
    assert losses[0] > 3 > 1 > losses[-1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")


def test_the_arithmetic_of_the_4b_llama_is_checked_against_the_model(tmp_path):
    (told,) = run_job("examples/llama_4b/check.py", 1, 1, folder=tmp_path).check().stdout
    assert told.count("4.01 B parameters") == 2
    largest = [float(line.split()[2]) for line in told.splitlines() if "largest stage" in line]
    assert len(largest) == 2
    assert all(5 < gib < 14 for gib in largest)
