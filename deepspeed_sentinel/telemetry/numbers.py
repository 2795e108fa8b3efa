"""What a step came to in numbers, for those who draw them: DeepSpeed's monitor, and Prometheus (``prometheus.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import workers_of
from deepspeed_sentinel.telemetry.who import Place, Who

_HIGHEST_SCORE = 1e9  # what is not finite is drawn at this height, as events have it


@dataclass(frozen=True)
class Numbers:
    """Of one step.

    Attributes:
        step: the engine's global step.
        time: when it was judged, in seconds since 1970.
        action: by which.
        totals: since the engine was attached to: steps, judged_messages, alarms, disputes, skipped_steps,
            excluded_column_steps.
        excluded_columns: how many were left out of this step.
        suspects: how many workers are to be tried after it.
        convicted: who is convicted after it.
        scores: of each stage, the highest score of a message that one of its workers sent; 1 is on the fence, 0 nothing
            was judged, none is above 1e9.
    """

    step: int
    time: float
    action: str
    totals: Mapping[str, int]
    excluded_columns: int
    suspects: int
    convicted: tuple[Place, ...]
    scores: tuple[float, ...]

    @classmethod
    def of(cls, verdict: Verdict, totals: Mapping[str, int], who: Who, now: float) -> Numbers:
        """Of a verdict, with the totals after it."""
        highest_S = np.fmax.reduce(np.nan_to_num(verdict.worker_scores, posinf=_HIGHEST_SCORE), axis=1)
        return cls(
            step=verdict.step,
            time=now,
            action=verdict.action,
            totals=dict(totals),
            excluded_columns=int(np.count_nonzero(verdict.excluded)),
            suspects=int(np.count_nonzero(verdict.suspects)),
            convicted=tuple(who(worker) for worker in workers_of(verdict.convicted)),
            scores=tuple(np.fmin(highest_S, _HIGHEST_SCORE).tolist()),
        )


def monitor_events(numbers: Numbers, samples: int) -> list[tuple[str, float, int]]:
    """As DeepSpeed's ``monitor.write_events`` takes them.

    Args:
        numbers: of a step.
        samples: the engine's ``global_samples`` after it, by which DeepSpeed draws its own curves.
    """
    named: dict[str, float] = {
        **{name: count for name, count in numbers.totals.items() if name not in ("steps", "judged_messages")},
        "excluded_columns": numbers.excluded_columns,
        "suspects": numbers.suspects,
        "convicted": len(numbers.convicted),
        **{f"score_stage_{stage}": score for stage, score in enumerate(numbers.scores)},
    }
    return [(f"Sentinel/{name}", value, samples) for name, value in named.items()]
