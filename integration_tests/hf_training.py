"""Part of jobs/hf.py: SentinelTrainer in several runs, or the Trainer of transformers in one process."""

from __future__ import annotations

import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.checkpoint import ds_to_universal
from tokenizers import Tokenizer, models
from torch.nn import functional
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from integration_tests.hf_models import SIZE, VOCABULARY, build
from integration_tests.jobs.scenarios import end_groups, groups

STEPS, SHORT, SAVED, FEW = 8, 4, 3, 2
MICRO_BATCHES = 8  # of a step, over all replicas
FAULT = {"stage": 1, "replica": 1, "attack": "nan", "start_step": 5}


def rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Texts of 6 to 14 tokens in which a token foretells the next."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, 15, (), generator=generator))
        start, step = torch.randint(3, 60, (2,), generator=generator).tolist()
        made.append({"input_ids": [3 + (start + step % 7 * index) % (VOCABULARY - 3) for index in range(length)]})
    return made


TRAIN, HELD_OUT = rows(440, seed=1), rows(16, seed=2)


def collator() -> DataCollatorForLanguageModeling:
    vocabulary = {f"t{index}": index for index in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t1")), pad_token="t0", eos_token="t2"
    )
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


DATA = {"train_dataset": TRAIN, "eval_dataset": HELD_OUT, "data_collator": collator()}


def z_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy plus 0.01 times the squared log partition function, over the label tokens."""
    logits, targets = outputs["logits"][:, :-1].float(), labels[:, 1:]
    kept = targets != -100
    logits, targets = logits[kept], targets[kept]
    total = functional.cross_entropy(logits, targets, reduction="sum") + 0.01 * logits.logsumexp(-1).square().sum()
    return total / (num_items_in_batch if num_items_in_batch is not None else len(targets))


def accuracy(predictions: Any) -> dict[str, float]:
    guessed, labels = predictions.predictions[:, :-1].argmax(-1), predictions.label_ids[:, 1:]
    kept = labels != -100
    return {"accuracy": float((guessed == labels)[kept].mean())}


def model(kind: str = "llama", seed: int = 0) -> Any:
    size = {**SIZE, "initializer_range": 0.05}
    if kind == "mixtral":
        config = MixtralConfig(**size, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1)
    else:
        config = LlamaConfig(**size, tie_word_embeddings=kind == "tied")
    return build(config, seed)


def arguments(folder: Path, replicas: int, deepspeed: dict[str, Any] | None, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": MICRO_BATCHES // replicas,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": STEPS // 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    if deepspeed is not None:
        options["deepspeed"] = deepspeed
    return TrainingArguments(**{**options, **changes})


BASE = {"zero_optimization": {"stage": 0}}  # accelerate insists on it
SHORTLY = {"max_steps": SHORT, "eval_strategy": "no"}
BRIEFLY = {**SHORTLY, "max_steps": FEW}
ZERO1 = {"zero_optimization": {"stage": 1}}
Z_LOSS = {"trainer_options": {"compute_loss_func": z_loss}, "micro_batches": 6}  # for two replicas and for three


class Runs:
    """Runs of one process, all on the same data; micro-batches are those of a step, over all replicas."""

    def __init__(self, folder: Path, stages: int | None, micro_batches: int = MICRO_BATCHES) -> None:
        self.folder, self.stages, self.micro_batches = folder, stages, micro_batches
        self.results: dict[str, Any] = {}
        self._groups = groups()

    def run(
        self,
        name: str,
        what: Any,
        deepspeed: dict[str, Any] | None = None,
        resume: str | None = None,
        save_to: str | None = None,
        stages: int | None = None,
        trainer_options: dict[str, Any] | None = None,
        mixin: type | None = None,
        micro_batches: int | None = None,
        **changes: Any,
    ) -> Any:
        kind: Any = Trainer
        replicas, config = int(os.environ.get("WORLD_SIZE", "1")), None
        if self.stages is not None:
            from deepspeed_sentinel.hf import SentinelTrainer

            kind, stages = SentinelTrainer, stages or self.stages
            replicas = int(os.environ["WORLD_SIZE"]) // stages
            config = {**BASE, "pipeline": {"stages": stages}, **(deepspeed or {})}
        if mixin is not None:
            kind = type(mixin.__name__, (mixin, kind), {})
        told: list[Any] = []
        trainer = kind(
            what,
            arguments(
                self.folder / name,
                replicas,
                config,
                gradient_accumulation_steps=(micro_batches or self.micro_batches) // replicas,
                **changes,
            ),
            callbacks=[listener(told)],
            **{**DATA, **(trainer_options or {})},
        )
        trainer.train(resume_from_checkpoint=resume)
        if save_to is not None:
            trainer.save_model(save_to)
        self.results[name] = {"history": trainer.state.log_history, "told": told}
        return trainer

    def finish(self, trainer: Any) -> None:
        if self.stages is not None:
            trainer._release_engine()
        gc.collect()
        if self.stages is not None:
            torch.distributed.barrier()
            end_groups(self._groups)


def listener(told: list[Any]) -> Any:
    from deepspeed_sentinel.hf import SentinelCallback

    class Listener(SentinelCallback):
        def on_sentinel_verdict(self, args, state, control, *, verdict, who, **kwargs):
            assert all(who(found.worker).host == socket.gethostname() for found in verdict.findings)
            named = [found.worker for found in (*verdict.findings, *verdict.proofs)]
            blamed = sorted({(worker.stage, worker.replica) for worker in named})
            told.append({"step": verdict.step, "blamed": blamed, "excluded": verdict.excluded.tolist()})

    return Listener()


def both(runs: Runs) -> None:
    """The runs that are compared, each the same with and without a pipeline."""
    metrics = {"trainer_options": {"compute_metrics": accuracy}}
    guard = {"sentinel": {"enabled": True, "output_dir": str(runs.folder / "events"), "warmup_steps": 4}}
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    final = runs.folder / "final"
    runs.finish(runs.run("long", model(), guard, save_to=str(final / "long"), **metrics, **saving))
    runs.finish(runs.run("mixtral", model("mixtral"), save_to=str(final / "mixtral"), **BRIEFLY))
    # A step and a half of micro-batches of two rows, so that the last step of an epoch has fewer micro-batches
    few = {"trainer_options": {"train_dataset": TRAIN[: 3 * runs.micro_batches]}}
    epochs = {**SHORTLY, "max_steps": -1, "num_train_epochs": 2}
    runs.finish(runs.run("epochs", model(), guard, **few, **epochs, gradient_checkpointing=True))
    halves = {"save_strategy": "steps", "save_steps": SHORT // 2}
    runs.finish(runs.run("z_loss", model("tied"), ZERO1, save_to=str(final / "z_loss"), **Z_LOSS, **SHORTLY, **halves))


def pipeline_only(runs: Runs) -> None:
    other_mesh(runs)
    guard = {"enabled": True, "output_dir": str(runs.folder / "events"), "warmup_steps": 4}
    checkpoint = str(runs.folder / "long" / f"checkpoint-{SAVED}")
    attacked = {"sentinel": {**guard, "inject": [FAULT]}}
    trainer = runs.run("attacked", model(seed=9), attacked, resume=checkpoint)
    runs.results["attacked"]["of_all_rows"] = trainer.predict(HELD_OUT).metrics["test_loss"]
    runs.finish(trainer)
    from_config = {
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": 0.0, "torch_adam": True},
        },
        "gradient_clipping": "auto",
        "bf16": {"enabled": True},
    }
    runs.finish(runs.run("bf16", model(), from_config, **{**BRIEFLY, "weight_decay": 0.0}, bf16=True))
    from deepspeed_sentinel.hf import SentinelTrainer

    trainer = SentinelTrainer(
        str(runs.folder / "final" / "long"),
        arguments(runs.folder / "evaluated", 2, {**ZERO1, "pipeline": {"stages": runs.stages}}),
        **DATA,
    )
    runs.results["evaluated"] = trainer.evaluate()
    runs.finish(trainer)


def other_mesh(runs: Runs) -> None:
    """From half-way through a run with ZeRO-1 on 3 x 2 go on with 2 x 3, by a universal checkpoint."""
    checkpoint = runs.folder / "z_loss" / f"checkpoint-{SHORT // 2}"
    if os.environ["RANK"] == "0":
        step = f"{checkpoint}/global_step{SHORT // 2}"
        convert = ["", f"--input_folder={step}", f"--output_folder={step}_universal"]
        # one worker is this process itself
        with mock.patch.object(sys, "argv", [*convert, "--num_extract_workers=1", "--num_merge_workers=1"]):
            ds_to_universal.main(ds_to_universal.parse_arguments())
    torch.distributed.barrier()
    universal = {**ZERO1, "checkpoint": {"load_universal": True}}
    half = {"resume": str(checkpoint), "stages": 2, **Z_LOSS}
    runs.finish(runs.run("other_mesh", model("tied", 9), universal, **half, **SHORTLY))


def run_all(folder: Path, stages: int | None) -> dict[str, Any]:
    """{run: {"history": the Trainer's log history, "told": what its callback was told}}."""
    runs = Runs(folder, stages, micro_batches=4)
    both(runs)
    if stages is not None:
        pipeline_only(runs)
    return runs.results
