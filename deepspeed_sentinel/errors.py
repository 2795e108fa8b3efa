"""Errors that end a run, named so that launch scripts and schedulers can tell them apart."""


class SentinelError(RuntimeError):
    """Base of the errors below."""


class SentinelHalt(SentinelError):
    """Training was stopped on purpose: ``action="halt"`` met a conviction, or too many steps were skipped."""


class VerdictMismatch(SentinelError):
    """Ranks came to different verdicts from what should be the same evidence."""


class WeightsDiffer(SentinelError):
    """Replicas of a stage hold different weights, and no strict majority of them the same."""


class LostWorker(SentinelError):
    """Another rank is gone or has failed; the text names its stage and replica."""
