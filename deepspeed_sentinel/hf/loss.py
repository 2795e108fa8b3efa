"""The loss on the last stage: the model's own, or a custom one, weighted as transformers' Trainer weights it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from deepspeed_sentinel.hf.batches import label_tokens
from deepspeed_sentinel.hf.router import Router


def one() -> int:
    return 1


def over(loss: torch.Tensor, divisor: Callable[[], int]) -> torch.Tensor:
    """The loss; its gradient will be divided by what ``divisor`` says now."""
    if loss.requires_grad and (by := divisor()) != 1:
        loss.register_hook(lambda gradient: gradient / by)
    return loss


class CausalLMLoss:
    """``loss_fn`` of the pipeline.

    With only labels it is what the model returns for this micro-batch: the mean over its label tokens, plus the
    router loss. With ``(labels, num_items_in_batch, shares)`` it is ``shares * (sum of token losses /
    num_items_in_batch + router loss)``; since the engine averages over micro-batches and replicas, of which there are
    ``shares``, a step's loss and gradient are those of the Trainer: every label token of the step counts the same,
    and router losses add up. In a twin step all replicas have the source's labels: ``num_items_in_batch`` is theirs.

    Args:
        function: the model's ``loss_function``.
        vocabulary: size of the vocabulary.
        router: of the model, or None.
        custom: ``compute_loss_func(outputs, labels, num_items_in_batch=...)`` in the model's place, as for the
            Trainer. It is given logits only, and as there the router loss is not added to it.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        vocabulary: int,
        router: Router | None,
        custom: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self._function = function
        self._vocabulary = vocabulary
        self._router = router
        self.custom = custom
        self.gradient_over: Callable[[], int] = one
        self.__name__ = "causal_lm_loss"

    def __call__(
        self, outputs: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        labels_BT, *weighting = labels if isinstance(labels, tuple) else (labels,)
        items, shares = weighting if weighting else (None, None)
        if self.custom is not None:
            loss = self.custom(CausalLMOutput(logits=parts[0]), labels_BT, num_items_in_batch=items)
        else:
            loss = self.of(parts, labels_BT, items)
        return loss if shares is None else over(loss * shares, self.gradient_over)

    def in_twin_step(self, labels: list[Any], replicas: int) -> list[Any]:
        """The source's labels of a twin step, with the number of label tokens that all replicas' have together."""
        counted = [one for one in labels if isinstance(one, tuple) and len(one) > 1]
        if not counted:
            return labels
        items = replicas * label_tokens([{"labels": one[0]} for one in counted])
        return [(one[0], items, *one[2:]) if isinstance(one, tuple) and len(one) > 1 else one for one in labels]

    def of(
        self, outputs: tuple[torch.Tensor, ...], labels_BT: torch.Tensor, items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The model's own loss.

        Args:
            outputs: logits [B, T, V], and with a router its sums.
            labels_BT: int64.
            items: by which the sum over label tokens is divided; the mean over them if None.
        """
        options: dict[str, Any] = {} if items is None else {"num_items_in_batch": items}
        loss = self._function(logits=outputs[0], labels=labels_BT, vocab_size=self._vocabulary, **options)
        return loss if self._router is None else loss + self._router.loss(outputs[1])
