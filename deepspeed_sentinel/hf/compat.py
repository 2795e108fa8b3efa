"""Names that have moved in transformers between the versions that are supported; see also by_replica.py."""

from __future__ import annotations

from transformers import PreTrainedModel

# By value: transformers 5.3 has no "greedy".
SCHEDULERS_OF_METRICS = ("reduce_lr_on_plateau", "greedy")
CHECKPOINTING = ("activation_checkpointing_enable", "activation_checkpointing_disable")
if not hasattr(PreTrainedModel, CHECKPOINTING[0]):  # transformers 5.23, not yet 5.16
    CHECKPOINTING = ("gradient_checkpointing_enable", "gradient_checkpointing_disable")
