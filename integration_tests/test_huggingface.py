"""transformers models in pipeline stages: every family, and the Trainer, beside the same in one piece."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from integration_tests.harness import start_job
from integration_tests.hf_families import CASES, HELD_OUT, MICRO_BATCHES
from integration_tests.hf_models import batches, configs
from integration_tests.hf_training import FAULT, FEW, SAVED, SHORT, STEPS
from integration_tests.variants import some

# float32 sums in another order; measured maxima: loss 8e-7, gradient 9e-7 of its tensor's largest entry
LOSS, GRADIENT, WEIGHT = 5e-6, 5e-6, 2e-3
LOGITS = 1e-3  # of the largest, after three steps of AdamW, which amplifies the rounding of small gradients
SCRIPT = "integration_tests/jobs/hf.py"
# One of each kind of difference; the other families and cuts are `make test-all`'s.
ALWAYS = ("llama/3", "llama/2", "llama/plain", "llama/packed")
SHORTLY = {*ALWAYS, "mixtral/checkpointed"}
SOME = some(CASES, SHORTLY)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, selected):
    """The job of one process and the one of 6, at the same time."""
    folder = tmp_path_factory.mktemp("hf")
    wanted = [*ALWAYS, *sorted(selected("case") - set(ALWAYS)), "training"]
    with (
        start_job(SCRIPT, 1, 1, folder=folder / "plain", args=["plain"]) as plain,
        start_job(SCRIPT, 3, 2, folder=folder / "pipeline", args=["pipeline", *wanted]) as pipeline,
    ):
        return plain.wait(400).check(), pipeline.wait(600).check()


@pytest.fixture(scope="module")
def families(jobs):
    return [result["families"] for result in jobs[1].results]


@pytest.fixture(scope="module")
def runs(jobs):
    """Runs of transformers' Trainer, and of SentinelTrainer on each rank."""
    return jobs[0].results[0]["training"], [result["training"] for result in jobs[1].results]


def check(families, case):
    worst = {key: max(rank[case][key] for rank in families) for key in ("loss", "evaluation", "gradient", "weight")}
    assert worst["loss"] < LOSS
    assert worst["evaluation"] < LOSS
    assert worst["gradient"] < GRADIENT
    assert worst["weight"] < WEIGHT


@pytest.mark.parametrize("case", SOME)
def test_a_family_trains_as_the_unsplit_model(families, case):
    """Also without masks, packed, checkpointed and in one stage."""
    check(families, case)


@pytest.mark.parametrize("case", SOME)
def test_a_saved_family_gives_the_logits_of_the_unsplit_model(jobs, case):
    folder, (family, _, kind, _) = jobs[1].folder, CASES[case]
    expected = torch.load(folder / f"{family}-{kind}.pt")["logits"]
    batch = batches(HELD_OUT, MICRO_BATCHES, kind)[0]
    model = AutoModelForCausalLM.from_pretrained(folder / f"saved-{case}").eval()
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    counted = batch["labels"] != -100
    assert counted.any()
    assert float((logits - expected)[counted].abs().max()) < LOGITS * float(expected[counted].abs().max())


def test_the_named_families_were_tried_with_2_and_3_stages():
    named = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "olmo", "mixtral", "qwen3_moe")
    assert {f"{family}/{stages}" for family in named for stages in (2, 3)} <= set(CASES)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("stages", "4 stages do not divide 6 processes; with so many, stages can be [1, 2, 3, 6]"),
        ("layers", "6 stages but only 4 decoder layers"),
        ("interval", "activation_checkpoint_interval is 2; allowed are 0 (off) and 1"),
        ("partition", "partition_method is 'best'; allowed are 'parameters', 'uniform'"),
    ],
)
def test_pipelines_that_cannot_be_are_refused_on_every_rank(jobs, asked, said):
    for result in jobs[1].results:
        assert said in result["refusals"][asked]


def test_padding_and_packing_change_the_loss(families):
    """The cases above would pass on what they ignore; here it shows that they do not."""
    losses = {families[0][case]["losses"][0] for case in ("llama/3", "llama/plain", "llama/packed")}
    assert len({round(loss, 4) for loss in losses}) == 3


def test_every_parameter_is_on_one_stage_and_a_tied_one_on_two(families):
    for case in families[0]:
        family, stages, _, _ = CASES[case]
        ranks = [rank[case] for rank in families]
        held = [name for rank in ranks[:: len(ranks) // stages] for name in rank["names"]]
        assert set(held) == set(ranks[0]["all_names"])
        twice = {name for name in held if held.count(name) > 1}
        tied = configs()[family].tie_word_embeddings and stages > 1
        assert twice == ({"model.embed_tokens.weight"} if tied else set())


def logged(history, key):
    return {entry["step"]: entry[key] for entry in history if key in entry}


@pytest.mark.parametrize("run", ["long", "mixtral", "z_loss", "epochs"])
@pytest.mark.parametrize("key", ["loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "epoch"])
def test_the_trainer_logs_what_it_logs_without_a_pipeline(runs, run, key):
    plain, pipeline = runs
    expected = logged(plain[run]["history"], key)
    for rank in pipeline:
        assert logged(rank[run]["history"], key) == pytest.approx(expected, rel=1e-5)


def test_the_compared_runs_are_of_the_length_meant(runs):
    plain, _ = runs
    assert list(logged(plain["long"]["history"], "loss")) == list(range(1, STEPS + 1))
    assert list(logged(plain["long"]["history"], "eval_loss")) == [STEPS // 2, STEPS]
    assert len(logged(plain["epochs"]["history"], "loss")) == 4  # twice a whole step and one of half the size


@pytest.mark.parametrize("run", ["long", "mixtral", "z_loss"])
def test_a_saved_model_is_an_ordinary_one_with_the_same_logits(jobs, run):
    plain, pipeline = (job.folder / name / "final" / run for job, name in zip(jobs, ("plain", "pipeline"), strict=True))
    batch = batches(0, 1)[0]
    del batch["labels"]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(plain)(**batch).logits
        logits = AutoModelForCausalLM.from_pretrained(pipeline)(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    index = json.loads((pipeline / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{stage}-of-00003.safetensors" for stage in (1, 2, 3)}


def test_a_saved_model_is_read_stage_by_stage_and_evaluates_as_it_did(runs):
    _, pipeline = runs
    for rank in pipeline:
        expected = logged(rank["long"]["history"], "eval_loss")[STEPS]
        assert rank["evaluated"]["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(runs):
    for rank in runs[1]:
        for key, steps in {"loss": range(SAVED + 1, FAULT["start_step"] + 1), "eval_loss": [STEPS // 2]}.items():
            whole, resumed = (logged(rank[run]["history"], key) for run in ("long", "attacked"))
            assert [resumed[step] for step in steps] == [whole[step] for step in steps]


def test_a_universal_checkpoint_goes_on_with_other_stages_and_replicas(runs):
    for rank in runs[1]:
        whole, resumed = (logged(rank[run]["history"], "loss") for run in ("z_loss", "other_mesh"))
        assert len(whole) == SHORT
        assert resumed == pytest.approx(whole, rel=1e-5)


def test_an_attack_is_excluded_logged_and_told_to_the_callback(runs):
    worker = [FAULT["stage"], FAULT["replica"]]
    for rank in runs[1]:
        told = rank["attacked"]["told"]
        assert [event["step"] for event in told] == list(range(FAULT["start_step"], STEPS))
        assert all(worker in event["blamed"] and event["excluded"] == [False, True] for event in told)
        excluded = logged(rank["attacked"]["history"], "sentinel/excluded")
        assert (excluded[FAULT["start_step"]], excluded[STEPS]) == (0, len(told))
        assert max(logged(rank["attacked"]["history"], "sentinel/convicted").values()) == 1


def test_an_evaluation_leaves_out_the_rows_that_a_convicted_worker_spoils(runs):
    for rank in runs[1]:
        honest = logged(rank["long"]["history"], "eval_loss")[STEPS]
        evaluated = logged(rank["attacked"]["history"], "eval_loss")[STEPS]
        assert evaluated == pytest.approx(honest, rel=0.05)
        assert rank["attacked"]["of_all_rows"] != pytest.approx(evaluated, rel=1e-4)


def test_with_no_attack_nothing_is_told(runs):
    for rank in runs[1]:
        assert rank["long"]["told"] == rank["epochs"]["told"] == []
        for run, last in (("long", STEPS), ("attacked", FAULT["start_step"])):
            alarms = logged(rank[run]["history"], "sentinel/alarms")
            assert {alarms[step] for step in alarms if step <= last} == {0}


def test_an_optimizer_in_the_deepspeed_config_and_mixed_precision_train(runs):
    plain, pipeline = runs
    expected = logged(plain["long"]["history"], "loss")
    for rank in pipeline:
        bf16 = logged(rank["bf16"]["history"], "loss")
        exact = {step: expected[step] for step in range(1, FEW + 1)}
        assert bf16 == pytest.approx(exact, rel=1e-3) and bf16 != exact
