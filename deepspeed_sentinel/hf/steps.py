"""A Trainer's micro-batches as the engine takes them: what the first and the last stage are given, and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

from deepspeed_sentinel.hf.batches import Batch, forward_inputs, label_tokens
from deepspeed_sentinel.hf.by_replica import TrainerByReplica
from deepspeed_sentinel.hf.compute_loss import ComputeLoss, labelled


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch until its step is run.

    Attributes:
        inputs: as the collator made it.
        items: label tokens of the step that it was read for, over all replicas, or None.
        together: micro-batches that were read for that step.
    """

    inputs: dict[str, Any]
    items: torch.Tensor | None
    together: int


def training_batches(trainer: Trainer, loss: ComputeLoss, step: Sequence[MicroBatch], replicas: int) -> list[Batch]:
    """The micro-batches of one step, weighted so that the engine's mean over them is the sum that a Trainer makes.

    In a twin step this replica's may be those of all replicas: they know the number of label tokens that there is then.

    Raises:
        ValueError: a batch that the pipeline cannot take, or batches with different columns.
    """
    own = _computes_own_loss(trainer)
    batches: list[Batch] = []
    columns: set[tuple[str, ...]] = set()
    for micro_batch, twin_items in zip(step, _twin_items(trainer, step, replicas), strict=True):
        inputs, items = micro_batch.inputs, micro_batch.items
        first = forward_inputs(inputs, ("input_ids",) if own else ("input_ids", "labels"), others=own)
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:  # the Trainer's own guess
            scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
        weight = len(step) if scaled else len(step) / micro_batch.together
        names, last = labelled(inputs if own else {"labels": inputs["labels"]}, items, weight, twin_items)
        batches.append((first, last))
        columns.add(names)
    if len(columns) > 1:
        different = sorted({name for names in columns for name in names if any(name not in one for one in columns)})
        raise ValueError(
            f"micro-batches of one step have different columns: {', '.join(different) or 'in another order'}. Let the "
            "data collator make the same ones of every batch."
        )
    loss.expect(columns.pop(), evaluates=False)
    return batches


def _twin_items(trainer: Trainer, step: Sequence[MicroBatch], replicas: int) -> list[torch.Tensor | None]:
    """Of each micro-batch ``items``, if all replicas had read for that step what this one has."""
    times = replicas if trainer.args.average_tokens_across_devices else 1
    counts: list[torch.Tensor | None] = []
    while len(counts) < len(step):
        first = step[len(counts)]
        read = step[len(counts) : len(counts) + first.together]
        count = None
        if first.items is not None:
            count = (label_tokens([one.inputs for one in read]) * times).to(first.items.device)
        counts += [count] * len(read)
    return counts


def evaluation_batch(
    trainer: Trainer, loss: ComputeLoss, inputs: dict[str, Any], has_labels: bool, replicas: int
) -> Batch:
    """One batch to evaluate; without labels no loss is computed."""
    own, items = _computes_own_loss(trainer), None
    if has_labels and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func):
        # Of this batch, times what compute_loss multiplies with: so the loss is the mean over the batch.
        items = label_tokens([inputs]) * (replicas if trainer.args.average_tokens_across_devices else 1)
    seen: dict[str, Any] = {}
    if has_labels:
        seen = inputs if own else {"labels": inputs["labels"]}
    names, last = labelled(seen, items, 1.0)
    loss.expect(names, evaluates=True)
    return forward_inputs(inputs, ("input_ids",), others=own), last


def _computes_own_loss(trainer: Trainer) -> bool:
    """Its ``compute_loss`` is not the Trainer's: it may look at all of a batch, and not at the labels alone."""
    return getattr(trainer.compute_loss, "__func__", None) is not TrainerByReplica.compute_loss
