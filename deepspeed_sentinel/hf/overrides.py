"""Methods of transformers' Trainer that SentinelTrainer does not call, or too late for an override to matter."""

from __future__ import annotations

_LOSS = "override compute_loss, or pass compute_loss_func"
_BATCH = "change batches in the data collator"
_SAVING = "override save_model"
_RESUMING = "override _prepare_for_training; checkpoints are the DeepSpeed engine's"

NEVER_CALLED = {
    "_prepare_inputs": _BATCH,
    "_prepare_input": _BATCH,
    "_prepare_context_parallel_inputs": _BATCH,
    "compute_loss_context_manager": _LOSS,
    "autocast_smart_context_manager": "set bf16 or fp16 in the DeepSpeed config",
    "_clip_grad_norm": "set max_grad_norm",
    "_move_model_to_device": "each stage's part is on its device from the start",
    "_save": _SAVING,
    "_load_from_checkpoint": _RESUMING,
    "_load_optimizer_and_scheduler": _RESUMING,
    "_load_scaler": _RESUMING,
    "_issue_warnings_after_load": _RESUMING,
}
_NOT_WITH = {
    "optimizer": ("create_optimizer", "get_optimizer_cls_and_kwargs", "get_decay_parameter_names"),
    "scheduler": ("create_scheduler",),
}


def check_overrides(kind: type, base: type, keys: set[str]) -> None:
    """Refuse a subclass whose methods would not be called.

    Args:
        kind: the class of the trainer that is being made.
        base: SentinelTrainer.
        keys: of the DeepSpeed config; with an "optimizer" or a "scheduler" there the Trainer makes none.

    Raises:
        ValueError: one line for each method, with what to do instead.
    """
    never = {
        **NEVER_CALLED,
        **{
            method: f'take "{key}" out of the DeepSpeed config'
            for key, methods in _NOT_WITH.items()
            if key in keys
            for method in methods
        },
    }
    problems = [
        f"  {owner.__name__}.{name}: {never[name]}"
        for owner in kind.__mro__[: kind.__mro__.index(base)]
        for name in vars(owner)
        if name in never
    ]
    if problems:
        raise ValueError(
            "SentinelTrainer would not call these methods, or too late to matter: the engine does their work.\n"
            + "\n".join(problems)
        )
