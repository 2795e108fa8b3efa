"""Events: one JSON object a line in ``events.jsonl``, written by rank 0."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepspeed_sentinel.evidence.weights import Comparison, Division
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import DIRECTIONS, columns_of
from deepspeed_sentinel.telemetry.book import COLUMNS
from deepspeed_sentinel.telemetry.standing import Above, Standing


def verdict_events(verdict: Verdict, every_step: bool) -> Iterator[dict[str, Any]]:
    """The events of one step, most important last."""
    if every_step:
        yield {
            "kind": "step",
            "scores": np.round(np.nan_to_num(verdict.worker_scores, posinf=1e9), 4).tolist(),
            "excluded": np.flatnonzero(verdict.excluded).tolist(),
            "warming_up": verdict.warming_up,
        }
    for finding in verdict.findings:
        yield {
            "kind": "alarm",
            "stage": finding.worker.stage,
            "replica": finding.worker.replica,
            "direction": DIRECTIONS[finding.direction],
            "link": finding.link,
            "micro_batches": list(finding.micro_batches),
            "statistic": finding.statistic,
            "value": finding.value,
            "residual": finding.residual,
            "low": finding.low,
            "high": finding.high,
            "score": min(finding.score, 1e9),
            "trusted": finding.trusted,
            "overflow": finding.overflow,
            "cause": finding.cause,
            "strikes": finding.strikes,
            "audit": finding.audit or None,
        }
    for dispute in verdict.disputed:
        yield {
            "kind": "dispute",
            "link": dispute.link,
            "direction": DIRECTIONS[dispute.direction],
            "column": dispute.column,
            "sender": list(dispute.sender),
            "receiver": list(dispute.receiver),
            "about": list(dispute.about) if dispute.about else None,
            "micro_batches": list(dispute.micro_batches),
            "audit": dispute.audit or None,
            "at_fault": list(dispute.at_fault) if dispute.at_fault else None,
        }
    if verdict.twins:
        yield {"kind": "twins", "suspects": np.argwhere(verdict.suspects).tolist()}
    for proof in verdict.proofs:
        yield {
            "kind": "proof",
            "stage": proof.worker.stage,
            "replica": proof.worker.replica,
            "column": proof.column,
            "of": "gradients" if proof.direction is None else DIRECTIONS[proof.direction],
            "micro_batches": list(proof.micro_batches),
            "agreeing": proof.agreeing,
            "compared": proof.compared,
            "trusted": proof.trusted,
        }
    for one in verdict.contradicted:
        yield {
            "kind": "contradicted",
            "stage": one.worker.stage,
            "replica": one.worker.replica,
            "partners": [list(partner) for partner in one.partners],
        }
    for difference in verdict.differences:
        yield {
            "kind": "difference",
            "workers": [list(worker) for worker in difference.workers],
            "as_received": difference.as_received,
            "of": "gradients" if difference.direction is None else DIRECTIONS[difference.direction],
        }
    for worker in verdict.cleared:
        yield {"kind": "cleared", "stage": worker.stage, "replica": worker.replica}
    if verdict.excluded.any():
        yield {"kind": "excluded", "columns": np.flatnonzero(verdict.excluded).tolist()}
    for worker in verdict.newly_convicted:
        yield {"kind": "conviction", "stage": worker.stage, "replica": worker.replica}
    for worker in verdict.released:
        yield {"kind": "release", "stage": worker.stage, "replica": worker.replica}
    if verdict.skip:
        yield {"kind": "skipped"}
    if verdict.halt:
        yield {"kind": "halt", "reason": verdict.halt}


def wiring_event(before: np.ndarray, wiring: np.ndarray) -> dict[str, Any]:
    """Who serves another column from a step on: [stage, replica, column before, column now] of each that moved.

    Args:
        before, wiring: int64 [S, C].
    """
    left, now = columns_of(before), columns_of(wiring)
    moved = [[*worker, int(left[worker]), int(now[worker])] for worker in map(tuple, np.argwhere(left != now).tolist())]
    return {"kind": "wiring", "moved": moved}


def weights_events(comparison: Comparison, found: Iterable[Division], action: str) -> Iterator[dict[str, Any]]:
    """One event for each worker that held other weights than most, then one for each stage without a majority.

    Args:
        comparison: what it came to.
        found: the stages whose replicas differ.
        action: "healed", "unhealed" (it was tried), "reported" (with action observe) or "stopped".
    """
    for worker in comparison.unequal:
        yield {"kind": "weights", "stage": worker.stage, "replica": worker.replica, "action": action}
    for one in found:
        if one.stage in comparison.undecided:
            groups = [list(group) for group in one.groups]
            yield {"kind": "weights", "stage": one.stage, "replica": None, "groups": groups, "action": action}


def device_event(what: Standing | Above) -> dict[str, Any]:
    """A device that people should look at.

    Args:
        what: a device with a proof behind it, or one whose rate of alarms lies above its peers'.
    """
    one = what.standing if isinstance(what, Above) else what
    rate = {"peers": what.peers, "chance": what.chance} if isinstance(what, Above) else {}
    return {
        "kind": "device",
        "why": "rate" if isinstance(what, Above) else "proof",
        "device": one.key,
        "place": one.place,
        "workers": [list(worker) for worker in one.workers],
        **{name: getattr(one, name) for name in COLUMNS},
        **rate,
    }


class EventLog:
    """Appends events to ``folder/events.jsonl``.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._file = (path / "events.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, event: dict[str, Any]) -> None:
        record = {"kind": event["kind"], "step": step, "time": round(time.time(), 3), **event}
        self._file.write(json.dumps(record, allow_nan=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
