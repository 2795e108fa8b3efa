"""Sentinel's findings where a Trainer's user looks for them: logs and a callback event."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from deepspeed_sentinel.engine.sentinel import Sentinel
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.telemetry.who import Who


class SentinelCallback(TrainerCallback):
    """A TrainerCallback with one event more. Any callback that has a method of this name is told."""

    def on_sentinel_verdict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        verdict: Verdict,
        who: Who,
        **kwargs: Any,
    ) -> TrainerControl | None:
        """Called on every rank after a step in which there is something to tell, before ``on_step_end``.

        That is a suspect, a dispute, what a twin step has shown, a conviction, a release, or a skipped step. The
        verdict is the same on all ranks; what the method does to ``control`` must be so too.

        Args:
            args, state, control: as of every event. ``state.global_step`` does not count this step yet.
            verdict: findings, disputes, proofs, excluded columns, convictions.
            who: names the workers of a verdict: ``who(worker)`` has rank, host and device, ``str`` of it is for people.
            kwargs: ``model``, ``optimizer`` and what else events are given.
        """
        return None


def has_news(verdict: Verdict) -> bool:
    """There is something to tell of this step."""
    found = (verdict.findings, verdict.disputed, verdict.proofs, verdict.differences)
    return bool(any(found) or verdict.newly_convicted or verdict.released or verdict.cleared or verdict.skip)


def tell(
    handler: CallbackHandler,
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    verdict: Verdict,
    who: Who,
) -> TrainerControl:
    """Call ``on_sentinel_verdict`` of every callback that has it, as the handler calls its own events."""
    for callback in handler.callbacks:
        event = getattr(callback, "on_sentinel_verdict", None)
        if event is None:
            continue
        result = event(
            args,
            state,
            control,
            verdict=verdict,
            who=who,
            model=handler.model,
            processing_class=handler.processing_class,
            optimizer=handler.optimizer,
            lr_scheduler=handler.lr_scheduler,
        )
        control = control if result is None else result
    return control


def log_entries(sentinel: Sentinel) -> dict[str, float]:
    """What a Trainer's log shows: totals since training began, and how many workers are convicted now."""
    counts, verdict = sentinel.counts, sentinel.last_verdict
    return {
        "sentinel/alarms": counts["alarms"],
        "sentinel/disputes": counts["disputes"],
        "sentinel/excluded": counts["excluded_column_steps"],
        "sentinel/skipped_steps": counts["skipped_steps"],
        "sentinel/convicted": int(verdict.convicted.sum()) if verdict is not None else 0,
    }
