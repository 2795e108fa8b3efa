"""Part of jobs/hf_twins.py: twin steps of SentinelTrainer and of a loop of one's own, and the same in one process.

Rows are of one length, or of lengths that are known beforehand, and have unequal numbers of label tokens. Each replica
records what it read for each step, and which replica's it trained on; in one process that is trained on again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import IterableDataset
from transformers import Trainer

from integration_tests.hf_models import VOCABULARY
from integration_tests.hf_training import BASE, arguments, model, z_loss
from integration_tests.jobs.scenarios import end_groups, groups
from integration_tests.trainer_runs import WeightedRows

STEPS, MICRO_BATCHES, EPOCH = 3, 2, 3
LENGTH = {"mixed": lambda index: 8 + index % 4, "refused": lambda index: 8 + index % 2}
SEQUENTIAL = {"train_sampling_strategy": "sequential", "eval_strategy": "no", "warmup_steps": 0}
# What each run trains with; that of one process is as long as this one's steps are.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "own_tokens": {"average_tokens_across_devices": False, "label_smoothing_factor": 0.1},
    "rows": {"remove_unused_columns": False},
    "mixtral": {},
    "mixed": {},
    "refused": {},
    "stream": {},
}
OPTIONS: dict[str, dict[str, Any]] = {"mixed": {"compute_loss_func": z_loss}}
MIXIN = {"rows": WeightedRows}
# Router losses are added up over all replicas', so the source's count as often.
COPIES = {"mixtral": 2}


def rows(name: str) -> list[dict[str, Any]]:
    """Rows for all replicas, in order; two make a micro-batch."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for index in range(4 * 2 * 2 * STEPS * MICRO_BATCHES):
        length = LENGTH.get(name, lambda _: 10)(index // 2)
        ids_T = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels_T = ids_T.clone()
        labels_T[: int(torch.randint(0, length - 1, (), generator=generator))] = -100
        row = {"input_ids": ids_T, "labels": labels_T}
        if name == "mixed" and index % 3 == 0:
            row["attention_mask"] = (torch.arange(length) < length - 2).long()
            labels_T[-2:] = -100
        elif name == "mixed":
            row["attention_mask"] = torch.ones(length, dtype=torch.int64)
        if name == "rows":
            labels_T[labels_T == -100] = 3
            row["weight"] = torch.tensor(1.0 + index % 5)
        made.append(row)
    return made


def stacked(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


def as_read(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The micro-batch that a row is."""
    (one,) = batch
    return {key: torch.tensor(value) for key, value in one.items()}


class Epochs(IterableDataset):
    """Some of the micro-batches at a time, one after the other, so that each epoch leaves some over."""

    def __init__(self, whole: Sequence[Any], size: int) -> None:
        self.whole, self.size, self.begin = whole, size, 0

    def __iter__(self) -> Iterator[Any]:
        self.begin += self.size
        return iter(self.whole[self.begin - self.size : self.begin])


def train(name: str, kind: Any, folder: Path, data: Any, collator: Any, micro_batches: int, config: Any) -> Any:
    if name in MIXIN:
        kind = type(name, (MIXIN[name], kind), {})
    options = {**SEQUENTIAL, **CASES[name], "max_steps": STEPS, "gradient_accumulation_steps": micro_batches}
    options |= {"per_device_train_batch_size": 2 if config else 1}
    trainer = kind(
        model("mixtral" if name == "mixtral" else "llama"),
        arguments(folder / name, 1, config, **options),
        train_dataset=data,
        data_collator=collator,
        **OPTIONS.get(name, {}),
    )
    trainer.train()
    return trainer


def in_pipeline(folder: Path, names: Sequence[str], twins: dict[str, Any]) -> dict[str, Any]:
    """{run: {"history", "read": what this replica read for each step, "words": of each step}}."""
    from deepspeed_sentinel.hf import SentinelTrainer

    class Recording(SentinelTrainer):
        read: list[list[Any]]
        words: list[int]

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            self.read[-1].append({key: value.tolist() for key, value in inputs.items()})
            loss = super().training_step(model, inputs, num_items_in_batch)
            if not self._held:
                self.read.append([])
                self.words.append(self.sentinel._twins.word)
            return loss

    results: dict[str, Any] = {}
    before = groups()
    block = {"enabled": True, "output_dir": str(folder / "events"), "seed": 3, "twins": twins}
    config = {**BASE, "pipeline": {"stages": 2}, "sentinel": block}
    for name in names:
        if name == "native":
            results[name] = native(folder, config["sentinel"])
            continue
        read: list[list[Any]] = [[]]
        words: list[int] = []
        kind = type("Recording", (Recording,), {"read": read, "words": words})
        data: Any = rows(name)
        if name == "stream":
            data = Epochs(data, 2 * EPOCH * 2)
        trainer = train(name, kind, folder, data, stacked, MICRO_BATCHES, config)
        results[name] = {"history": trainer.state.log_history, "read": read[:STEPS], "words": words}
        trainer._release_engine()
        gc.collect()
        torch.distributed.barrier()
        end_groups(before)
    return results


def native(folder: Path, block: dict[str, Any]) -> dict[str, Any]:
    """Steps of a loop of one's own, without learning anything; the second half counts the label tokens itself."""
    import deepspeed_sentinel
    from deepspeed_sentinel import hf
    from deepspeed_sentinel.engine import access
    from deepspeed_sentinel.hf.batches import label_tokens

    pipeline = hf.to_pipeline(model(), num_stages=2)
    engine, *_ = deepspeed_sentinel.initialize(
        model=pipeline,
        optimizer=torch.optim.SGD(pipeline.parameters(), lr=0.0),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            "sentinel": block,
        },
    )
    access.keep_gradient_norm(engine)
    replica, replicas = engine.grid.get_data_parallel_id(), engine.grid.data_parallel_size
    every = rows("native")
    losses, norms, words, reads = [], [], [], []
    for step in range(STEPS):
        begin = step * replicas * MICRO_BATCHES
        read = [
            [
                stacked(every[2 * at : 2 * at + 2])
                for at in range(begin + one, begin + MICRO_BATCHES * replicas, replicas)
            ]
            for one in range(replicas)
        ]
        items = label_tokens([batch for batches in read for batch in batches]) if step >= STEPS // 2 else None
        losses.append(float(engine.train_batch(hf.step_batches(engine, read[replica], items))))
        norms.append(float(engine.get_global_grad_norm()))
        words.append(engine.sentinel._twins.word)
        reads.append([{key: value.tolist() for key, value in batch.items()} for batch in read[replica]])
    engine.sentinel.detach()
    engine.destroy()
    logged = [{"step": 1 + i, "loss": losses[i], "grad_norm": norms[i]} for i in range(STEPS)]
    return {"history": logged, "words": words, "read": reads}


def in_one_process(folder: Path, trained_on: dict[str, list[list[Any]]]) -> dict[str, Any]:
    """{run: the Trainer's history}, on these micro-batches of each step."""
    results: dict[str, Any] = {}
    for name, steps in trained_on.items():
        if name == "native":
            results[name] = [whole_of(batches) for batches in steps]
            continue
        copies = COPIES.get(name, 1)
        data: Any = [batch for batches in steps for batch in batches for _ in range(copies)]
        count = len(steps[0]) * copies
        if name == "stream":
            data = Epochs(data, EPOCH)
        trainer = train(name, Trainer, folder, data, as_read, count, None)
        results[name] = trainer.state.log_history
    return results


def whole_of(batches: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Loss and gradient norm of the fresh model over all label tokens."""
    whole = model()
    made = [{key: torch.tensor(value) for key, value in batch.items()} for batch in batches]
    logits = torch.cat([whole(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1) for batch in made])
    loss = functional.cross_entropy(logits, torch.cat([batch["labels"][:, 1:].flatten() for batch in made]))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in whole.parameters()])
    return {"loss": float(loss), "grad_norm": float(norm)}
