"""What people do with a Trainer: with SentinelTrainer on 2 stages x 2 replicas as with transformers' own."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer

from deepspeed_sentinel.hf.overrides import NEVER_CALLED
from integration_tests.harness import start_job
from integration_tests.hf_models import batches
from integration_tests.hf_training import model
from integration_tests.trainer_runs import LORA_STEPS, SAVED

SCRIPT = "integration_tests/jobs/trainer.py"
COMPARED = ("lora", "times_ten", "weighted_rows", "stream", "lower", "upper")
MEANS = hasattr(Trainer, "loss_is_scaled_for_ga")  # the Trainer can be told that a loss is a mean: in 5.23, not in 5.16
KEYS = ("loss", "grad_norm", "learning_rate", "eval_loss", "epoch", "num_input_tokens_seen", "total_flos", "train_loss")
CLOSE = 1e-5  # float32 sums in another order; measured maximum 2.4e-6, of a gradient norm within 40 steps


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    with (
        start_job(SCRIPT, 1, 1, folder=folder / "plain", args=["plain"]) as plain,
        start_job(SCRIPT, 2, 2, folder=folder / "pipeline", args=["pipeline"]) as pipeline,
    ):
        return plain.wait(400).check(), pipeline.wait(600).check()


@pytest.fixture(scope="module")
def plain(jobs):
    return jobs[0].results[0]


@pytest.fixture(scope="module")
def ranks(jobs):
    return jobs[1].results


def logged(run, key):
    return {entry["step"]: entry[key] for entry in run["history"] if key in entry}


@pytest.mark.parametrize("run", COMPARED)
def test_every_rank_logs_what_the_trainer_logs(plain, ranks, run):
    if run == "weighted_rows" and not MEANS:
        pytest.skip("this transformers takes every loss for a share of the step's")
    for key in KEYS:
        expected = logged(plain[run], key)
        assert expected or key in ("eval_loss", "num_input_tokens_seen")
        for rank in ranks:
            assert logged(rank[run], key) == pytest.approx(expected, rel=CLOSE), key


def test_the_runs_do_what_they_are_named_for(plain):
    losses = {run: list(logged(plain[run], "loss").values()) for run in COMPARED}
    assert len(losses["lora"]) == LORA_STEPS
    assert losses["times_ten"][0] > 40
    assert losses["weighted_rows"][0] < 6 or not MEANS
    # the second and third step are run with what is left over from before, so their losses are of 14 micro-batches
    assert len(losses["stream"]) == 3 and losses["stream"][1] > 1.5 * losses["stream"][0]
    first, last, _ = [entry["eval_loss"] for entry in plain["weighted_rows"]["history"] if "eval_loss" in entry]
    assert plain["best"]["metric"] == first > last


def test_the_best_model_is_loaded_at_the_end(plain, ranks):
    for run in (plain["best"], *(rank["best"] for rank in ranks)):
        assert run["evaluated"] == pytest.approx(run["metric"], rel=CLOSE)


def test_what_the_trainer_calls_is_called_or_refused(plain, ranks):
    assert "compute_loss" in plain["called"]
    called = set().union(*(rank["called"] for rank in ranks))
    assert set(plain["called"]) - called <= set(NEVER_CALLED)
    assert called & set(NEVER_CALLED) == {"_clip_grad_norm"}  # when the engine has clipped and stepped


def test_prediction_without_labels_gives_the_same_logits_and_no_loss(jobs, plain, ranks):
    expected, predicted = (torch.load(job.folder / "predictions.pt") for job in jobs)
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)
    for rank in ranks:
        assert rank["predicted"] == plain["predicted"]
        assert rank["predicted"]["labels"] is False


@pytest.mark.parametrize(("run", "kind", "close"), [("lora", "llama", 1e-4), ("lora_upper", "tied", 2e-2)])
def test_saved_adapters_are_those_of_the_trainer(jobs, run, kind, close):
    """The second's first stage has no adapter, and it was trained in bf16."""
    plain, pipeline = (job.folder / "final" / run for job in jobs)
    assert {file.name for file in plain.iterdir()} == {file.name for file in pipeline.iterdir()}
    expected, weights = (load_file(folder / "adapter_model.safetensors") for folder in (plain, pipeline))
    assert set(weights) == set(expected)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (plain, pipeline)]
    assert configs[0] == configs[1]
    batch = {"input_ids": batches(0, 1)[0]["input_ids"]}
    with torch.no_grad():
        before = model(kind)(**batch).logits
        logits = [PeftModel.from_pretrained(model(kind), folder)(**batch).logits for folder in (plain, pipeline)]
    moved = float((logits[0] - before).abs().max())
    assert float((logits[1] - logits[0]).abs().max()) < 10 * close * moved
    torch.testing.assert_close(logits[1], logits[0], rtol=close, atol=close)


def test_training_of_adapters_goes_on_from_a_checkpoint_that_lacks_the_frozen_weights(jobs, ranks):
    rest = range(SAVED + 1, LORA_STEPS + 1)
    for rank in ranks:
        whole, resumed = (logged(rank[run], "loss") for run in ("lora", "lora_resumed"))
        assert [resumed[step] for step in rest] == [whole[step] for step in rest]
    step = jobs[1].folder / "lora" / f"checkpoint-{SAVED}" / f"global_step{SAVED}"
    layer = torch.load(step / "layer_01-model_states.pt")
    assert layer and all("lora" in name for name in layer)


def test_adapters_above_a_frozen_stage_train_in_bf16(plain, ranks):
    expected = logged(plain["lora_upper"], "loss")
    for rank in ranks:
        assert logged(rank["lora_upper"], "loss") == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("use", ["call", "base_call", "generate", "save_pretrained", "base_save_pretrained"])
def test_a_part_of_a_model_is_not_used_as_the_whole(ranks, use):
    for index, rank in enumerate(ranks):
        said = rank["as_whole"][use]
        assert said.startswith("PartialModel: ") and f"stage {index // 2} of 2" in said and "save_model(folder)" in said


def test_tied_weights_in_bf16_have_the_gradient_of_the_unsplit_model_without_a_sentinel_too(jobs, plain, ranks):
    if "tied_bf16" not in plain:
        pytest.skip("DeepSpeed before 0.18.3 loses gradients of another dtype than the weights', and is refused")
    expected = logged(plain["tied_bf16"], "grad_norm")[1]
    for rank in ranks:
        assert logged(rank["tied_bf16"], "grad_norm")[1] == pytest.approx(expected, rel=1e-2)
    copies = [torch.load(jobs[1].folder / f"tied.{rank}.pt") for rank in range(4)]
    assert all(torch.equal(copy, copies[0]) for copy in copies)
