"""``Trainer.compute_loss`` on the last stage, where the outputs are: the pipeline's ``loss_fn`` under a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from deepspeed_sentinel.hf.batches import ALLOWED
from deepspeed_sentinel.hf.loss import CausalLMLoss, one, over

_FORWARD = tuple(key for key in ALLOWED if key != "labels")
_LOSS_OPTIONS = ("labels", "num_items_in_batch", "return_dict", "use_cache")


class ModelOutputs:
    """What ``compute_loss`` is given as ``model``: called with its inputs, it hands out the outputs of the pipeline.

    The forward pass has been made by then, by all stages. So it can be called once a micro-batch, and not with other
    inputs than the stages were given.
    """

    def __init__(
        self,
        stage_model: PreTrainedModel,
        own_loss: CausalLMLoss,
        outputs: tuple[torch.Tensor, ...],
        inputs: Mapping[str, torch.Tensor],
    ) -> None:
        self.config, self.training = stage_model.config, stage_model.training
        self.logits = outputs[0]
        self._name, self._own_loss, self._outputs = type(stage_model).__name__, own_loss, outputs
        self._inputs: dict[str, torch.Tensor] | None = dict(inputs)
        self._modules: dict[str, Any] = {}  # Accelerator.unwrap_model looks for compiled ones

    def __call__(self, **given: Any) -> CausalLMOutput:
        """Outputs with ``logits``, and with ``loss`` if there are ``labels``.

        Raises:
            ValueError: it was called before, or with something that the forward pass did not have.
        """
        if self._inputs is None:
            raise ValueError(
                "compute_loss called the model a second time in one micro-batch; the pipeline runs it once. Keep the "
                "outputs of the first call, or use a model without a pipeline."
            )
        labels, items = given.get("labels"), given.get("num_items_in_batch")
        had = {key: self._inputs[key] for key in _FORWARD if key in self._inputs}
        wrong = [key for key in (*given, *had) if key not in _LOSS_OPTIONS and given.get(key) is not had.get(key)]
        if wrong:
            raise ValueError(
                f"compute_loss called the model with another {wrong[0]!r} than the pipeline's forward pass had, which "
                f"was over before: it takes {', '.join(_FORWARD)} as they are in the batch. Change them in the data "
                "collator; take other columns out of the inputs before the call."
            )
        self._inputs = None
        loss = None if labels is None else self._own_loss.of(self._outputs, labels, items)
        return CausalLMOutput(loss=loss, logits=self.logits)

    def _get_name(self) -> str:
        """The model's class, by which the Trainer knows that labels are to be shifted."""
        return self._name

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"compute_loss asked the model for {name!r}: in a pipeline it is given the model's outputs only, since no "
            "stage has the whole model. trainer.model has this stage's part."
        )


class ComputeLoss:
    """``loss_fn`` of the pipeline: a Trainer's ``compute_loss``, weighted so that a step sums up as the Trainer's.

    Args:
        own_loss: the model's.
        stage_model: this stage's part of the model.
        compute: the trainer's ``compute_loss``, looked up for each micro-batch.
    """

    def __init__(self, own_loss: CausalLMLoss, stage_model: PreTrainedModel, compute: Callable[..., Any]) -> None:
        self._own_loss, self._stage_model, self._compute = own_loss, stage_model, compute
        self._names: tuple[str, ...] = ()
        self._evaluates = False
        self.gradient_over = one
        self.__name__ = "compute_loss"

    def expect(self, names: tuple[str, ...], evaluates: bool) -> None:
        """Say what the labels of the next batches are: tensors of these names, as ``labelled`` packs them."""
        self._names, self._evaluates = names, evaluates

    def __call__(self, outputs: torch.Tensor | tuple[torch.Tensor, ...], labels: tuple[torch.Tensor, ...]) -> Any:
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        inputs = dict(zip(self._names, labels, strict=True))
        weight, items = inputs.pop(WEIGHT), inputs.pop(ITEMS, None)
        inputs.pop(TWIN_ITEMS, None)
        if self._evaluates and not inputs:
            return torch.zeros((), device=parts[0].device)  # nothing to compute a loss of: the logits are wanted
        model = ModelOutputs(self._stage_model, self._own_loss, parts, inputs)
        if not self._evaluates:
            return over(self._compute(model, inputs, num_items_in_batch=items) * weight, self.gradient_over)
        loss, returned = self._compute(model, inputs, return_outputs=True, num_items_in_batch=items)
        logits = returned.get("logits") if isinstance(returned, dict) else returned[1]
        if logits is not model.logits:
            raise ValueError(
                "compute_loss returned other outputs than the model's; evaluation in a pipeline hands on the model's "
                "logits. Change them in preprocess_logits_for_metrics or compute_metrics."
            )
        return loss.detach().mean() * weight

    def in_twin_step(self, labels: list[tuple[torch.Tensor, ...]], replicas: int) -> list[tuple[torch.Tensor, ...]]:
        """The source's labels, with the number of label tokens that its own make where all replicas train on them."""
        return [self._in_twin_step(one) for one in labels]

    def _in_twin_step(self, labels: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self._names, labels, strict=True))
        return tuple({**named, ITEMS: named[TWIN_ITEMS]}.values()) if ITEMS in named else labels


# No column of a batch has a name that begins with a space.
ITEMS, TWIN_ITEMS, WEIGHT = "num_items_in_batch", " items in a twin step", " weight"


def labelled(
    inputs: Mapping[str, Any], items: torch.Tensor | None, weight: float, twin_items: torch.Tensor | None = None
) -> tuple[tuple[str, ...], tuple[torch.Tensor, ...]]:
    """Names and tensors of what ``ComputeLoss`` is given of a micro-batch.

    Args:
        inputs: what ``compute_loss`` sees of it.
        items: label tokens of the step, or None where the Trainer counts none.
        weight: what the loss is multiplied by.
        twin_items: what ``items`` is where all replicas are given these inputs; none where nothing is trained.

    Raises:
        ValueError: an input is no tensor.
    """
    counted = {name: count for name, count in ((ITEMS, items), (TWIN_ITEMS, twin_items)) if count is not None}
    named = {**inputs, **counted, WEIGHT: torch.tensor(weight)}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"a batch has {name!r}, a {type(value).__name__}; only tensors reach compute_loss on the last stage. "
                "Make it a tensor in the data collator, or drop it."
            )
    return tuple(named), tuple(named.values())
