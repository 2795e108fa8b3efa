"""Mistakes in a Trainer's arguments and DeepSpeed config: each with its message."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import TrainingArguments

from deepspeed_sentinel.hf.options import Mesh, check_arguments, check_config, engine_config, given_config
from deepspeed_sentinel.hf.trainer import SentinelTrainer

GOOD = {"zero_optimization": {"stage": 0}, "pipeline": {"stages": 1}}


def arguments(tmp_path, deepspeed=None, **options):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", deepspeed=deepspeed, **options)


def test_a_config_may_be_a_dict_or_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GOOD))
    assert given_config(arguments(tmp_path, str(path))) == given_config(arguments(tmp_path, GOOD)) == GOOD


@pytest.mark.parametrize("pipeline", [None, {}, {"stages": "4"}, {"stages": True}, "auto"])
def test_without_a_number_of_stages_there_is_no_pipeline(tmp_path, pipeline):
    config = {"zero_optimization": {"stage": 0}, **({} if pipeline is None else {"pipeline": pipeline})}
    with pytest.raises(ValueError, match=r'expected "pipeline": \{"stages": 4\}'):
        given_config(arguments(tmp_path, config))


def test_pipeline_keys_without_effect_are_refused(tmp_path):
    config = {**GOOD, "pipeline": {"stages": 1, "use_reentrant": True}}
    with pytest.raises(
        ValueError, match=r"\"pipeline\" has 'use_reentrant'.*allowed are stages, partition, activation"
    ):
        given_config(arguments(tmp_path, config))


def test_without_a_config_it_is_said_how_it_looks(tmp_path):
    with pytest.raises(ValueError, match="SentinelTrainer needs a DeepSpeed config"):
        given_config(arguments(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pipeline": {"stages": 2}}, r"does not divide 1 processes; allowed are \[1\]"),
        ({"zero_optimization": {"stage": 3}}, r'"stage": 3\} cannot be used with a pipeline; allowed are 0 and 1'),
        ({"train_batch_size": 7}, '"train_batch_size" is 7, but 2 samples a micro-batch x 4 micro-batches x 1 repl'),
        ({"csv_monitor": {"enabled": True}}, "csv_monitor cannot be used"),
    ],
)
def test_impossible_configs_are_refused(tmp_path, change, said):
    args = arguments(tmp_path, GOOD, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match=said):
        check_config({**GOOD, **change}, args)


def test_processes_that_transformers_does_not_see_are_noticed(tmp_path, monkeypatch):
    args = arguments(tmp_path, GOOD)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=r"8 processes were started, but TrainingArguments counts 1.*use_cpu=True"):
        check_config(GOOD, args)


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adalomo"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        {"neftune_noise_alpha": 5.0},
        {"auto_find_batch_size": True},
        {"push_to_hub": True},
        {"bf16_full_eval": True},
        {"train_sampling_strategy": "batch_rebalance"},
        {"accelerator_config": {"split_batches": True}},
        {"accelerator_config": {"even_batches": False}},
        {"accelerator_config": {"use_seedable_sampler": False}},
    ],
)
def test_arguments_without_effect_are_refused_by_name(tmp_path, options):
    check_arguments(arguments(tmp_path))
    named = next(iter(options.get("accelerator_config", options)))
    with pytest.raises(ValueError, match=rf"does not support these training arguments:\n.*{named}="):
        check_arguments(arguments(tmp_path, **options))


def test_the_engine_counts_by_replicas_and_clips_as_the_trainer_says(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_grad_norm=0.5)
    config = engine_config({"train_batch_size": 64}, args, Mesh(stages=4, replicas=3))
    assert (config["train_batch_size"], config["gradient_clipping"]) == (24, 0.5)
    assert engine_config({"gradient_clipping": 2.0}, args, Mesh(4, 3))["gradient_clipping"] == 2.0


def test_nothing_is_clipped_but_the_norm_taken_where_the_trainer_does_not_clip(tmp_path):
    args = arguments(tmp_path, max_grad_norm=0.0)
    assert engine_config({"gradient_clipping": 0.0}, args, Mesh(4, 3))["gradient_clipping"] == float("inf")
    # ZeRO takes it in any case
    assert engine_config({"zero_optimization": {"stage": 1}}, args, Mesh(4, 3))["gradient_clipping"] == 0.0


def test_without_training_the_engine_has_no_optimizer_and_no_zero(tmp_path):
    filled = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    config = engine_config(filled, arguments(tmp_path), Mesh(1, 1), trains=False)
    assert config["bf16"] == {"enabled": True}
    assert not {"optimizer", "zero_optimization"} & set(config)


@pytest.mark.parametrize("given", [{"model_init": lambda: None}, {"optimizers": (object(), None)}])
def test_models_and_optimizers_made_before_the_split_are_refused(tmp_path, given):
    with pytest.raises(ValueError, match=f"does not support {next(iter(given))}: "):
        SentinelTrainer(None, arguments(tmp_path, GOOD), **given)


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, deepspeed_sentinel, deepspeed_sentinel.hf; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
