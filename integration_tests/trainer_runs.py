"""Part of jobs/trainer.py: what people do with a Trainer, with SentinelTrainer on 2 x 2 and with transformers' own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from torch.utils.data import IterableDataset
from transformers import Trainer

from deepspeed_sentinel.engine.internals import release
from integration_tests.hf_training import HELD_OUT, TRAIN, Runs, collator, model

LORA_STEPS, SAVED = 6, 4
FEW = {"max_steps": 2, "eval_strategy": "no"}
THREE = {**FEW, "max_steps": 3}
EVALUATED = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}


class TimesTen:
    """The short form: what the Trainer computes, changed."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (10 * result[0], result[1]) if return_outputs else 10 * result


class WeightedRows:
    """The usual form: outputs and labels, and a column of one's own; the mean of a micro-batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels, weight_B = inputs.pop("labels"), inputs.pop("weight")
        outputs = model(**inputs)
        token_losses = functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        loss = (weight_B * token_losses.mean(1)).sum() / weight_B.sum()
        return (loss, outputs) if return_outputs else loss


def weighted(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([float(len(row["input_ids"])) for row in rows])
    return {**collator()([{"input_ids": row["input_ids"]} for row in rows]), "weight": lengths}


def unlabelled(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collator()([{"input_ids": row["input_ids"]} for row in rows])
    return {key: value for key, value in batch.items() if key != "labels"}


class Stream(IterableDataset):
    """28 rows, 14 micro-batches: a step of 8 over all replicas, and 6 left over."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(TRAIN[:28])


def frozen(half: str) -> Any:
    """A model of which the first or the last of two stages is not trained."""
    made = model()
    layers = made.model.layers
    lower = [made.model.embed_tokens, layers[0], layers[1]]
    for part in lower if half == "lower" else [layers[2], layers[3], made.model.norm, made.lm_head]:
        part.requires_grad_(False)
    return made


def lora(kind: str = "llama", **options: Any) -> PeftModel:
    base = model(kind)
    torch.manual_seed(5)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))


# adapters on the first stage's embedding and in all layers, and the last stage's head trained whole
TARGETS = ["embed_tokens", "q_proj", "v_proj", "down_proj"]
ADAPTED = {"target_modules": TARGETS, "modules_to_save": ["lm_head"], "use_rslora": True}
UPPER = {"target_modules": ["q_proj"], "layers_to_transform": [2, 3], "use_dora": True}


class Calls:
    """Which methods of the Trainer are called, by name."""

    def __init__(self, *classes: type) -> None:
        self.names: set[str] = set()
        for owner in classes:
            for name, method in list(vars(owner).items()):
                if inspect.isfunction(method):
                    setattr(owner, name, self._noting(name, method))

    def _noting(self, name: str, method: Any) -> Any:
        @functools.wraps(method)
        def noting(*args: Any, **kwargs: Any) -> Any:
            self.names.add(name)
            return method(*args, **kwargs)

        return noting


def both(runs: Runs) -> None:
    """The runs that are compared, each the same with and without a pipeline."""
    final = runs.folder / "final"
    guard = {"sentinel": {"enabled": True, "output_dir": str(runs.folder / "events")}}
    zero1 = {**guard, "zero_optimization": {"stage": 1}}
    saved = {"save_strategy": "steps", "save_steps": SAVED, "eval_steps": LORA_STEPS, "max_steps": LORA_STEPS}
    trainer = runs.run("lora", lora(**ADAPTED), zero1, **saved, learning_rate=2e-2, save_to=str(final / "lora"))
    if runs.stages is not None:
        runs.results["as_whole"] = used_as_whole(trainer)
    runs.finish(trainer)
    # in bf16 only with a pipeline: the frozen tied weight then has no gradient of any kind
    bf16 = {} if runs.stages is None else {"bf16": True}
    config = {**zero1, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    upper = {**THREE, "learning_rate": 2e-2, "save_to": str(final / "lora_upper"), **bf16}
    runs.finish(runs.run("lora_upper", lora("tied", **UPPER), config, **upper))
    unclipped = {"max_grad_norm": 0.0, "include_num_input_tokens_seen": "all", "label_smoothing_factor": 0.1}
    runs.finish(runs.run("times_ten", model(), guard, mixin=TimesTen, **unclipped, **{**EVALUATED, "max_steps": 2}))
    rows = {"trainer_options": {"data_collator": weighted}, "remove_unused_columns": False}
    # the checkpoint with the highest loss, as "best": it is not the last
    best = {"load_best_model_at_end": True, "greater_is_better": True, "save_strategy": "steps", "save_steps": 2}
    trainer = runs.run("weighted_rows", model(), zero1, mixin=WeightedRows, **rows, **{**EVALUATED, **best})
    runs.results["best"] = {"metric": trainer.state.best_metric, "evaluated": trainer.evaluate()["eval_loss"]}
    runs.finish(trainer)
    stream = {"trainer_options": {"train_dataset": Stream()}, "include_num_input_tokens_seen": "non_padding"}
    runs.finish(runs.run("stream", model(), guard, micro_batches=8, **stream, **THREE))
    trainer = runs.run("lower", frozen("lower"), zero1, **FEW)
    trainer.data_collator = unlabelled
    predicted = trainer.predict(HELD_OUT)
    runs.results["predicted"] = {"labels": predicted.label_ids is not None, "metrics": sorted(predicted.metrics)}
    torch.save(torch.from_numpy(predicted.predictions), runs.folder / "predictions.pt")
    runs.finish(trainer)
    runs.finish(runs.run("upper", frozen("upper"), guard, **FEW))
    if release(deepspeed.__version__) < (0, 18, 3):  # refused there, see access.gradient_divisor
        return
    trainer = runs.run("tied_bf16", model("tied").bfloat16(), {"zero_optimization": {"stage": 1}}, **FEW)
    if runs.stages is not None:
        of = trainer.model.get_input_embeddings() if trainer.pipeline.is_first else trainer.model.lm_head
        torch.save(of.weight.detach(), runs.folder / f"tied.{trainer.args.process_index}.pt")
    runs.finish(trainer)


def used_as_whole(trainer: Any) -> dict[str, str]:
    """What a stage's part of a model says when it is used as if it were the whole."""
    ids = torch.ones(1, 3, dtype=torch.int64)
    uses = {
        "call": lambda: trainer.model(input_ids=ids),
        "base_call": lambda: trainer.model.get_base_model().model(input_ids=ids),
        "generate": lambda: trainer.model.generate(input_ids=ids),
        "save_pretrained": lambda: trainer.model.save_pretrained("nowhere"),
        "base_save_pretrained": lambda: trainer.model.get_base_model().save_pretrained("nowhere"),
    }
    said = {}
    for name, use in uses.items():
        try:
            use()
            said[name] = "no error"
        except RuntimeError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def pipeline_only(runs: Runs) -> None:
    zero1 = {
        "sentinel": {"enabled": True, "output_dir": str(runs.folder / "events")},
        "zero_optimization": {"stage": 1},
    }
    checkpoint = str(runs.folder / "lora" / f"checkpoint-{SAVED}")
    changes = {"max_steps": LORA_STEPS, "eval_strategy": "no", "learning_rate": 2e-2}
    runs.finish(runs.run("lora_resumed", lora(**ADAPTED), zero1, resume=checkpoint, **changes))


def run_all(folder: Path, stages: int | None) -> dict[str, Any]:
    """{run: {"history": ..., ...}}; "called" names the methods of the Trainer that the compared runs called."""
    runs = Runs(folder, stages, micro_batches=4)
    if stages is None:
        calls = Calls(Trainer)
    else:
        from deepspeed_sentinel.hf import SentinelTrainer

        calls = Calls(Trainer, SentinelTrainer)
    both(runs)
    runs.results["called"] = sorted(calls.names)
    if stages is not None:
        pipeline_only(runs)
    return runs.results
