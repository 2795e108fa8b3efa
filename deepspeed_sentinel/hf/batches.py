"""Batches for a pipeline: what the first stage takes, what the last stage takes, and whether their shapes change.

A message tells its parts by their dtype, so that it needs no table of contents: the hidden state comes first, then
(with a router loss) a float vector, then position ids (integers) and the attention mask (bool), if there are any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_sentinel.engine import access

IGNORED = -100
ALLOWED = ("input_ids", "attention_mask", "position_ids", "labels")
Batch = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


def to_batch(batch: Mapping[str, Any], num_items_in_batch: torch.Tensor | int | None = None, shares: int = 1) -> Batch:
    """One micro-batch of a transformers collator as ``train_batch`` and ``eval_batch`` take it.

    Args:
        batch: ``input_ids`` and ``labels``, int64 [B, T], and optionally ``attention_mask`` [B, T] (0 is padding) and
            ``position_ids`` [B, T]. A mask without padding is dropped where that changes nothing.
        num_items_in_batch: label tokens that count in the whole step, over all micro-batches and replicas. The loss
            is then weighted by tokens, as the Trainer does; without, it is the mean over this micro-batch. In a twin
            step the source's label tokens times the replicas are counted in its place.
        shares: micro-batches times replicas, over which the engine averages.

    Raises:
        ValueError: other keys, or a mask that is not [B, T].
    """
    inputs = forward_inputs(batch)
    labels = [batch["labels"]]
    if num_items_in_batch is not None:
        labels += [torch.as_tensor(num_items_in_batch), torch.tensor(shares)]
    return inputs, tuple(labels)


def forward_inputs(
    batch: Mapping[str, Any], needed: Sequence[str] = ("input_ids", "labels"), others: bool = False
) -> tuple[torch.Tensor, ...]:
    """What the first stage takes of a micro-batch.

    Args:
        batch: as in ``to_batch``.
        needed: keys that must be there.
        others: keys that the model does not take are passed over, not refused.

    Raises:
        ValueError: as ``to_batch``.
    """
    unknown = [] if others else [key for key in batch if key not in ALLOWED]
    if unknown:
        raise ValueError(
            f"a batch has {', '.join(map(repr, unknown))}; allowed are {', '.join(ALLOWED)}. Drop other columns "
            "or use another data collator."
        )
    missing = [key for key in needed if key not in batch]
    if missing:
        raise ValueError(
            f"a batch lacks {' and '.join(map(repr, missing))}. For language modelling use "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False), which makes labels of input_ids."
        )
    inputs = [batch["input_ids"]]
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is not None:
        inputs.append(positions.expand_as(batch["input_ids"]).contiguous())
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; allowed is [batch, tokens] with 0 for padding. For "
                "packed sequences pass position_ids that start anew with each sequence."
            )
        # With position ids a mask has a second meaning: transformers then does not look for packed sequences.
        if positions is not None or not bool(mask.all()):
            inputs.append(mask.bool())
    return tuple(inputs)


def label_tokens(batches: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Number of labels that count: a token is predicted from those before it, so the first of a row does not."""
    return torch.stack([batch["labels"][..., 1:].ne(IGNORED).sum() for batch in batches]).sum()


def step_batches(
    engine: Any,
    batches: Sequence[Mapping[str, Any]],
    num_items_in_batch: torch.Tensor | int | None = None,
    shares: int | None = None,
) -> Iterator[Batch]:
    """The micro-batches of one step for ``engine.train_batch``, weighted by tokens as the Trainer weights them.

    The loss of the step, and so the gradient, is the sum over all label tokens of all replicas divided by their
    number. To be called on every rank, with the same batches on all stages of a replica.

    Args:
        engine: the pipeline engine.
        batches: this replica's micro-batches, as transformers collators make them.
        num_items_in_batch: as in ``to_batch``; counted over the replicas if not given.
        shares: as in ``to_batch``; by default micro-batches times replicas.
    """
    if num_items_in_batch is None:
        count = label_tokens(batches).to(engine.device)
        dist.all_reduce(count, group=engine.mpu.get_data_parallel_group())
        num_items_in_batch = count.cpu()
    shares = shares or len(batches) * engine.grid.data_parallel_size
    engine.module.loss_fn.gradient_over = access.gradient_divisor(engine)
    ready = [to_batch(batch, num_items_in_batch, shares) for batch in batches]
    announce_shapes(engine, ready)
    return iter(ready)


def announce_shapes(engine: Any, batches: Sequence[Batch]) -> None:
    """Tell an engine when messages are about to change their shape; it reuses buffers otherwise.

    Within a step of equal shapes nothing is sent beside the messages; where shapes differ, each message is announced.
    So what is announced depends on the replica's own micro-batches alone, and not on whether it is a twin step.
    """
    shapes = [tuple((part.dtype, part.shape) for part in inputs) for inputs, _ in batches]
    last = getattr(engine, "_sentinel_message_shapes", None)
    mixed = len(set(shapes)) > 1
    if mixed or last is None or shapes[0] != last:
        engine.reset_activation_shape()
    engine.dynamic_shape = mixed
    engine._sentinel_message_shapes = None if mixed else shapes[0]
