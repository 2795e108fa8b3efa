"""What the steps of a run come to, as lines of the log, in the order in which things happen.

    ALARM or DISPUTE -> LEFT OUT -> SUSPECT -> PROVED -> CONVICTED, by what was told above -> NOW, what to do
    -> ISOLATED -> HALT

A column that stays left out is not told again before that changes, nor is who is isolated. What a convicted worker goes
on doing is told once, then counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.judgement.trial import Difference, Proof
from deepspeed_sentinel.judgement.unsettled import Contradicted
from deepspeed_sentinel.judgement.verdict import Dispute, Finding, Verdict
from deepspeed_sentinel.mesh import Mesh, Worker, workers_of
from deepspeed_sentinel.telemetry.exclusion import FILE, proved, reason
from deepspeed_sentinel.telemetry.suspicion import suspicion
from deepspeed_sentinel.telemetry.who import Who

# What somebody has to act on; the rest is a warning.
_LEVELS = {"CONVICTED": logging.ERROR, "NOW": logging.ERROR, "HALT": logging.CRITICAL}
_Told = Proof | Contradicted | Difference | Finding | Dispute
_NEXT = {
    "observe": 'Nothing is done about it ("action": "observe").',
    "exclude": "Its column is left out of steps in which it is in alarm, and of no other.",
    "quarantine": "Its column is left out from here on, and training goes on without it.",
    "halt": "Training stops with a checkpoint.",
}
_INEXACT = (
    "made other bits of the same than most of its stage, on hardware or with settings of another kind, as it says. Its "
    "messages are held to theirs by statistics alone and its gradients by their norm, and twin steps go on without its "
    "column; that is told once"
)
_UNSURE = (
    "statistics alone convict here, and where nothing is left out they can name an honest worker behind a real fault"
)
_ISOLATED = (
    "Somebody keeps columns out and cannot be proved, and these are the fewest who would explain it: they are dealt "
    "into as few columns as can hold them. It convicts nobody"
)


class Story:
    """Tells verdicts, one after the other.

    Attributes:
        suspects, isolated: bool [S, R], as of the last one.
        steps: how many there were.
        since: alarms, disputes and proofs of each convicted worker that were not told.
        steps_since: in how many steps there were any.

    Args:
        config: the settings.
        mesh: the mesh.
        who: names the workers.
        say: gets a step, a line and its level of logging.
    """

    def __init__(self, config: SentinelConfig, mesh: Mesh, who: Who, say: Callable[[int, str, int], None]) -> None:
        self._mesh, self._who, self._say = mesh, who, say
        self.go_by(config)
        self.suspects = np.zeros((mesh.stages, mesh.replicas), bool)
        self.isolated = self.suspects
        self._out: tuple[int, ...] = ()
        self._inexact: set[Worker] = set()
        self.steps = 0
        self.since: Counter[Worker] = Counter()
        self.steps_since: Counter[Worker] = Counter()

    def go_by(self, config: SentinelConfig) -> None:
        """Tell of settings that are others from the next step on."""
        self._config, self._by_proof = config, config.convicts_by(self._mesh) == "proof"

    def step(self, verdict: Verdict) -> None:
        """Tell what one step came to."""
        before = self.since.copy()
        for line in self._lines(verdict):
            self._say(verdict.step, line, _LEVELS.get(line.partition(":")[0], logging.WARNING))
        self.suspects, self.isolated = verdict.suspects.copy(), verdict.isolated.copy()
        self.steps_since.update((self.since - before).keys())
        self.steps += 1

    def _lines(self, verdict: Verdict) -> Iterator[str]:
        for finding in verdict.findings:
            yield from self._unless_convicted(finding, f"ALARM: {finding}", verdict)
        for dispute in verdict.disputed:
            yield from self._unless_convicted(dispute, f"DISPUTE: {dispute}", verdict)
        yield from self._left_out(verdict)
        for worker in workers_of(verdict.suspects & ~self.suspects):
            yield f"SUSPECT: {worker}: {suspicion(verdict, worker)}; {self._trial(worker)}"
        shown: tuple[_Told, ...] = (*verdict.proofs, *verdict.contradicted, *verdict.differences)
        for one in shown:
            yield from self._unless_convicted(one, str(one), verdict)
        for worker in verdict.inexact:
            if worker not in self._inexact:
                self._inexact.add(worker)
                yield f"{worker} {_INEXACT}"
        for worker in verdict.cleared:
            yield f"CLEARED: {worker}; given the same, it does what its stage does"
        for worker in verdict.newly_convicted:
            yield f"CONVICTED: {worker}{self._why(verdict, worker)}"
            yield f"NOW: {self._what_now(worker, proved(verdict, worker)).lstrip()}"
        for worker in verdict.released:
            yield f"RELEASED: {worker}, on probation"
        if (isolated := workers_of(verdict.isolated)) != workers_of(self.isolated):
            yield (
                f"ISOLATED: {'; '.join(map(str, isolated))}. {_ISOLATED}" if isolated else "nobody is isolated any more"
            )
        if verdict.excluded.all():
            yield "every column excluded, step skipped"
        elif verdict.skip:
            yield "gradients overflow in most replicas of a stage, step skipped"
        if verdict.halt:
            yield f"HALT: {verdict.halt}"

    def _why(self, verdict: Verdict, worker: Worker) -> str:
        """By what it is convicted; what a line of the same step has told is not told again."""
        why = reason(verdict, worker)
        if why in map(str, (*verdict.proofs, *verdict.contradicted)):
            return ", PROVED above"
        if why in map(str, verdict.findings):
            return ", by strikes: the last is the ALARM above"
        return f". {why}"

    def _left_out(self, verdict: Verdict) -> Iterator[str]:
        out = tuple(np.flatnonzero(verdict.excluded).tolist())
        if out == self._out:
            return
        self._out = out
        columns = f"column{'s'[: len(out) > 1]} {', '.join(map(str, out))}"
        yield f"LEFT OUT of the weights: {columns} of {self._mesh.replicas}" if out else "all columns count again"

    def _trial(self, worker: Worker) -> str:
        if self._mesh.is_trusted(worker.stage):
            return "first and last stage are trusted and never convicted: look at its data and its hardware"
        if not self._by_proof:
            return f"{self._config.strikes} strikes within {self._config.strike_window} steps convict"
        return f"the next twin step tries it{', which comes soon' if self._config.tries_suspects else ''}"

    def _what_now(self, worker: Worker, proved: bool) -> str:
        place, file = self._who(worker), f"{self._config.output_dir}/{FILE}"
        machine = f"{place.host}, slot {place.local_rank}" if place.host else "its machine"
        next_steps = _NEXT.get(self._config.action or "", "")
        if self._config.inject:
            return f"{next_steps} Faults are injected, so {machine} has nothing to answer for; {file} is as in earnest"
        if self._config.action == "observe" and not proved:
            return f"{next_steps} Look into {machine}: {_UNSURE}, and no line of {file} leaves it out"
        part = place.gpu or "its processor and memory"
        return f"{next_steps} Take {machine} out of service and test {part}; {file} says how to start without it"

    def _unless_convicted(self, told: _Told, line: str, verdict: Verdict) -> Iterator[str]:
        known = _convicted_before(told, verdict)
        if known is None:
            yield line
            return
        if not self.since[known]:
            yield f"{known} goes on after its conviction; from here on that is counted and not told"
        self.since[known] += 1


def _convicted_before(told: _Told, verdict: Verdict) -> Worker | None:
    """The worker that something is told of, if it was convicted before this step."""
    if isinstance(told, Difference):
        return None
    named = (told.sender, told.receiver) if isinstance(told, Dispute) else (told.worker,)
    known = [one for one in named if verdict.convicted[one] and one not in verdict.newly_convicted]
    return known[0] if known else None
