"""What a watched engine says: lines of the log on rank 0, and events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from deepspeed.utils import logger

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine.opening import JUDGING, guarding
from deepspeed_sentinel.engine.reduction import Poisoned
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.weights import Comparison, Division
from deepspeed_sentinel.judgement.proof import Difference, Proof
from deepspeed_sentinel.judgement.unsettled import Contradicted
from deepspeed_sentinel.judgement.verdict import Dispute, Finding, Verdict
from deepspeed_sentinel.mesh import Mesh, Worker
from deepspeed_sentinel.telemetry.events import (
    EventLog,
    device_event,
    verdict_events,
    weights_events,
    wiring_event,
)
from deepspeed_sentinel.telemetry.standing import Above, Standing

_Opened = TypeVar("_Opened")
_Told = Proof | Contradicted | Difference | Finding | Dispute
_UNEQUAL = {
    "healed": "it was given theirs, and training goes on",
    "unhealed": "what it was given did not stay, or it holds tensors of other shapes. Its memory is unsound, or it "
    "lies: resume without it",
    "reported": "reported only",
    "stopped": "nothing was healed, since another stage has no majority",
}


def _convicted_before(told: _Told, verdict: Verdict) -> Worker | None:
    """The worker that something is told of, if it was convicted before this step."""
    if isinstance(told, Difference):
        return None
    named = (told.sender, told.receiver) if isinstance(told, Dispute) else (told.worker,)
    known = [one for one in named if verdict.convicted[one] and one not in verdict.newly_convicted]
    return known[0] if known else None


def opened(control: Control, how: Callable[[], _Opened] | None) -> tuple[_Opened | None, str]:
    """What a rank opens, and why rank 0 could not, which all ranks are told; empty if it could. Collective.

    Args:
        control: gathers of all ranks.
        how: opens it, or raises OSError; None on ranks that open nothing.
    """
    found, problem = None, ""
    try:
        found = how() if how else None
    except OSError as error:
        problem = str(error)
    return found, control.of_first(problem)


class Telling:
    """Says on rank 0 what happens; on other ranks it is silent. Collective to create.

    Args:
        config: whose ``output_dir`` and ``events`` say where events go, and which.
        mesh: the mesh watched.
        control: gathers of all ranks.

    Raises:
        ValueError: on every rank, when rank 0 cannot write events.
    """

    def __init__(self, config: SentinelConfig, mesh: Mesh, control: Control) -> None:
        self._config, self._mesh = config, mesh
        self._first = dist.get_rank() == 0
        self._said: set[str] = set()
        self._warming_up = True
        self._untold: Counter[Worker] = Counter()
        self._log = self._open_log(control)

    def close(self) -> None:
        self.summary()
        if self._log:
            self._log.close()

    def summary(self) -> None:
        """How much of convicted workers the log was spared."""
        for worker, count in sorted(self._untold.items()):
            logger.warning(f"[sentinel] {worker}: {count} alarms, disputes and proofs since it was convicted")
        self._untold.clear()

    def start(self, step: int) -> None:
        """What is watched, what cannot be seen, and what is injected."""
        config, mesh = self._config, self._mesh
        self._event(
            step,
            {
                "kind": "start",
                "mesh": {"stages": mesh.stages, "replicas": mesh.replicas},
                "config": config.model_dump(mode="json"),
                "injecting": bool(config.inject),
            },
        )
        if not self._first:
            return
        logger.warning(f"[sentinel] {guarding(config, mesh)}")
        for injection in config.inject:
            logger.warning(
                f"[sentinel] !!! FAULT INJECTION IS ON !!! stage {injection.stage}, replica {injection.replica}: "
                f"{injection.attack} {injection.arguments or ''} on {injection.direction} messages ({injection.where}) "
                f"from step {injection.start_step}. Never do this in a run whose weights you need."
            )

    def verdict(self, verdict: Verdict) -> None:
        """What one step came to."""
        if not self._first:
            return
        for event in verdict_events(verdict, every_step=self._config.events == "steps"):
            self._event(verdict.step, event)
        if self._warming_up and not verdict.warming_up:
            self._warn(verdict.step, JUDGING)
        self._warming_up = verdict.warming_up
        for worker in verdict.newly_convicted:
            self._warn(verdict.step, f"{worker} CONVICTED")
        for worker in verdict.released:
            logger.info(f"[sentinel] step {verdict.step}: {worker} released, on probation")
        shown: tuple[_Told, ...] = (*verdict.proofs, *verdict.contradicted, *verdict.differences)
        for told in (*shown, *verdict.findings, *verdict.disputed):
            known = _convicted_before(told, verdict)
            if known is None:
                self._warn(verdict.step, str(told))
            else:
                self._untold[known] += 1
        for worker in verdict.cleared:
            logger.info(
                f"[sentinel] step {verdict.step}: {worker} cleared: given the same, it does what its stage does"
            )
        if verdict.excluded.all():
            self._warn(verdict.step, "every column excluded, step skipped")
        elif verdict.skip:
            logger.info(f"[sentinel] step {verdict.step}: gradients overflow in most replicas of a stage, step skipped")

    def wiring(self, step: int, before: np.ndarray, wiring: np.ndarray) -> None:
        """Who serves another column from a step on; int64 [S, C] each."""
        if not self._first:
            return
        event = wiring_event(before, wiring)
        self._event(step, event)
        if self._config.wiring == "heal":
            moves = ", ".join(f"{Worker(*move[:2])} to {move[3]}" for move in event["moved"])
            self._warn(step, f"columns dealt anew: {moves}")

    def exclusions(self, write: Callable[[], Path | None]) -> None:
        """Have written which machines to leave out, and say where."""
        try:
            path = write()
        except OSError as error:
            logger.warning(f"[sentinel] cannot write which machines to leave out: {error}")
            return
        if path:
            self._once("exclusions", f"workers are convicted; their machines, and how to start without them: {path}")

    def own_wiring(self) -> None:
        """A state was taken over whose columns others served."""
        if self._first:
            logger.warning(
                '[sentinel] the state taken over is of columns dealt anew, and "wiring" is "static" here: they are '
                "DeepSpeed's own again, so convicted workers may stand in more of them than they did"
            )

    def left_out_of_evaluation(self, out_C: np.ndarray) -> None:
        """Columns that an evaluation's mean is without, bool [C]; on one rank, that need not be the first."""
        columns = ", ".join(map(str, np.flatnonzero(out_C)))
        self._once(
            "evaluation",
            f"an evaluation's mean leaves out columns with convicted workers, here {columns}: their data are not in "
            "it. Told once",
        )

    def misfit(self, step: int, worker: Worker) -> None:
        """A worker's mean for the baseline that cannot be."""
        if not self._first:
            return
        self._warn(
            step,
            f"{worker} told the other replicas of its stage a mean that no message of the size it reported can have, "
            "and its messages were clean: it lies, or it miscalculates. It counted for nothing",
        )
        self._event(step, {"kind": "misfit", "stage": worker.stage, "replica": worker.replica})

    def weights(self, comparison: Comparison, found: Sequence[Division], action: str) -> None:
        """Replicas that hold different weights, and what was done; see ``weights_events``."""
        if not self._first:
            return
        for worker in comparison.unequal:
            (of_stage,) = (one for one in found if one.stage == worker.stage)
            self._warn(
                comparison.step,
                f"{worker} holds other weights or optimizer state than most replicas of its stage: "
                f"{_UNEQUAL[action]} ({of_stage})",
            )
        for one in found:
            if one.stage in comparison.undecided:
                self._warn(comparison.step, f"weights differ, and no more than half of the replicas agree: {one}")
        for event in weights_events(comparison, found, action):
            self._event(comparison.step, event)

    def poisoned(self, what: Poisoned) -> None:
        """A reduction that gave something else than it must."""
        if not self._first:
            return
        self._warn(what.step, str(what))
        named = [list(worker) for worker in what.named]
        self._event(what.step, {"kind": "poisoned", "stages": list(what.stages), "named": named})

    def device(self, step: int, what: Standing | Above) -> None:
        """A device that people should look at."""
        if not self._first:
            return
        why = (
            "more alarms than its peers, which convicts nobody"
            if isinstance(what, Above)
            else "PROVED BEFORE to make something else than its peers of the same"
        )
        self._warn(step, f"{why}: {what}")
        self._event(step, device_event(what))

    def ledger(self, lines: Sequence[str]) -> None:
        """What is out of the ordinary about the ledger."""
        for line in lines if self._first else ():
            logger.warning(f"[sentinel] {line}")

    def unwritten(self, error: OSError) -> None:
        """The ledger's file cannot be written to."""
        if self._first:
            self._once(
                "unwritten",
                f"the ledger of devices cannot be written: {error}. Counts stay in memory and in checkpoints, and are "
                "written as soon as it can be; told once",
            )

    def replayed(self, step: int, inconsistent: Sequence[Worker]) -> None:
        """Who made two things of the same."""
        if not self._first:
            return
        for worker in inconsistent:
            self._warn(
                step, f"PROVED: computing the same step twice, {worker} made something else of it the second time"
            )
            self._event(step, {"kind": "replay", "stage": worker.stage, "replica": worker.replica})

    def unseen(self, problem: str | None) -> None:
        """What this rank, whichever it is, could not judge at first and lets pass."""
        if problem:
            self._once("unseen", f"not judged: {problem} Told once; with this action it passes")

    def split(self, text: str) -> None:
        """Ranks that do not come to the same verdict, where none is acted on."""
        if self._first:
            self._once("split", f"{text} From here on they may report different things; told once")

    def anew(self, parts: int, before: int) -> None:
        """A state that was taken over and does not fit the messages."""
        if self._first:
            logger.warning(
                f"[sentinel] messages have {parts} judged parts, and the state taken over is of {before}: fences and "
                f"convictions start anew, with {self._config.warmup_steps} steps of warm-up"
            )

    def _warn(self, step: int, text: str) -> None:
        logger.warning(f"[sentinel] step {step}: {text}")

    def _once(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(f"[sentinel] {text}")

    def _event(self, step: int, event: dict[str, Any]) -> None:
        if not self._log:
            return
        try:
            self._log.write(step, event)
        except OSError as error:
            # A full disk is no reason to end a run.
            self._log = None
            logger.warning(f"[sentinel] cannot write to {self._config.output_dir!r} any more: {error}")

    def _open_log(self, control: Control) -> EventLog | None:
        """Only rank 0 writes, but all ranks must fail together when it cannot."""
        wanted = self._first and self._config.events != "none"
        log, problem = opened(control, (lambda: EventLog(self._config.output_dir)) if wanted else None)
        if problem:
            raise ValueError(
                f"sentinel.output_dir: cannot write to {self._config.output_dir!r}: {problem}. Name a folder that "
                'rank 0 can write to, or set "events": "none".'
            )
        return log
