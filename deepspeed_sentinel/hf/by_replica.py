"""What has moved in transformers' Trainer between the versions that are supported."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

_SMOOTHER_COUNTS = "num_items_in_batch" in LabelSmoother.__call__.__code__.co_varnames  # transformers 5.16, not 5.10.1


class TrainerByReplica(Trainer):
    """``Trainer`` that scales its loss by replicas, in all versions: all stages of one have the same batches."""

    loss_is_scaled_for_ga: bool | None = None  # transformers 5.23, not yet 5.16

    if "get_tp_size" not in Trainer.compute_loss.__code__.co_names:  # transformers 5.23; 5.16 takes all processes

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            counts = self.model_accepts_loss_kwargs or self.compute_loss_func
            if num_items_in_batch is None or not counts or not self.args.average_tokens_across_devices:
                return result
            smoothed = self.label_smoother is not None and not _SMOOTHER_COUNTS
            # the mean over a batch: in evaluation nothing is added up that it would have to be scaled for
            times = self.get_tp_size() if model.training or not smoothed else self.accelerator.num_processes
            return (result[0] / times, result[1]) if return_outputs else result / times
