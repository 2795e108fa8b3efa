"""Sentinel's findings where a Trainer's user looks for them: logs and a callback event."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepspeed_sentinel.engine.sentinel import Sentinel
from deepspeed_sentinel.judgement.verdict import Verdict


class SentinelCallback(TrainerCallback):
    """A TrainerCallback with one event more. Any callback that has a method of this name is told."""

    def on_sentinel_verdict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, verdict: Verdict, **kwargs: Any
    ) -> TrainerControl | None:
        """Called on every rank after a step in which there is something to tell, before ``on_step_end``.

        That is a suspect, a dispute, a conviction, a release, or a skipped step. The verdict is the same on all
        ranks; what the method does to ``control`` must be so too.

        Args:
            args, state, control: as of every event. ``state.global_step`` does not count this step yet.
            verdict: findings, disputes, excluded columns, convictions.
            kwargs: ``model``, ``optimizer`` and what else events are given.
        """
        return None


def has_news(verdict: Verdict) -> bool:
    """There is something to tell of this step."""
    return bool(verdict.findings or verdict.disputed or verdict.newly_convicted or verdict.released or verdict.skip)


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
