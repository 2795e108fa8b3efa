"""What a watched engine says: lines of the log on rank 0, and events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch.distributed as dist

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine.controlfile import FILE as CONTROL_FILE
from deepspeed_sentinel.engine.opening import JUDGING, opening
from deepspeed_sentinel.engine.reduction import Poisoned
from deepspeed_sentinel.engine.requests import Decision
from deepspeed_sentinel.engine.story import Story
from deepspeed_sentinel.engine.voice import Voice
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.weights import Comparison, Division
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import Mesh, Worker
from deepspeed_sentinel.telemetry import events
from deepspeed_sentinel.telemetry.eventlog import EVENTS_FILE
from deepspeed_sentinel.telemetry.exclusion import FILE, Convict
from deepspeed_sentinel.telemetry.findings import device_event, verdict_events, weights_events, wiring_event
from deepspeed_sentinel.telemetry.report.words import many
from deepspeed_sentinel.telemetry.standing import Above, Standing
from deepspeed_sentinel.telemetry.who import Who

_UNEQUAL = {
    "healed": "it was given theirs, and training goes on",
    "unhealed": "what it was given did not stay, or it holds tensors of other shapes. Its memory is unsound, or it "
    "lies: resume without it",
    "reported": "reported only",
    "stopped": "nothing was healed, since another stage has no majority",
}


class Telling:
    """Says on rank 0 what happens; on other ranks it is silent. Collective to create.

    Attributes:
        run_id: of this run, the same on all ranks.

    Args:
        config: whose ``output_dir`` and ``events`` say where events go, and which.
        mesh: the mesh watched.
        control: gathers of all ranks.
        who: names the workers.

    Raises:
        ValueError: on every rank, when rank 0 cannot write events.
    """

    def __init__(self, config: SentinelConfig, mesh: Mesh, control: Control, who: Who) -> None:
        self._config, self._mesh, self._who = config, mesh, who
        self._first = dist.get_rank() == 0
        self._voice = Voice(config, control, who)
        self.run_id = self._voice.run_id
        self._story = Story(config, mesh, who, self._voice.of_step)
        self._warming_up = True

    def close(self) -> None:
        self._voice.close()

    def note(self, text: str) -> None:
        """A line of this rank's, whichever it is."""
        self._voice.note(text)

    def end(self, step: int, counts: Mapping[str, int], convicted: Sequence[Worker]) -> None:
        """The end of a run: what it came to.

        Args:
            step: the engine's global step.
            counts: see ``Gate``.
            convicted: who is convicted by now.
        """
        story = self._story
        if not self._first or not story.steps:
            return
        since = sorted(story.since.items())
        totals = {"steps": story.steps, **counts}
        self._voice.event(step, events.End(totals, tuple(convicted), [[*worker, count] for worker, count in since]))
        for worker, count in since:
            what = "alarms, disputes and proofs" if count > 1 else "alarm, dispute or proof"
            steps = many(story.steps_since[worker], "step")
            self._voice.note(f"{worker}: {count:,} {what} in {steps} since it was convicted")
        names = ", ".join(map(str, convicted)) or "nobody"
        kept = self._config.events != "none"
        files = f"Events: {self._config.output_dir}/{EVENTS_FILE}" if kept else "Events were not kept"
        without = f"; how to start again: {self._config.output_dir}/{FILE}" if convicted else ""
        self._voice.note(
            f"END at step {step}: {many(story.steps, 'step')} and {many(counts['judged_messages'], 'message')} judged, "
            f"{many(counts['alarms'], 'message')} in alarm, {many(counts['disputes'], 'dispute')}, "
            f"{many(counts['excluded_column_steps'], 'column-step')} left out, "
            f"{many(counts['skipped_steps'], 'step')} skipped. Convicted: {names}{without}. {files}"
        )

    def start(self, step: int) -> None:
        """What is watched, what cannot be seen, and what is injected."""
        config, mesh = self._config, self._mesh
        shape = {"stages": mesh.stages, "replicas": mesh.replicas}
        self._voice.event(step, events.Start(shape, config.model_dump(mode="json"), bool(config.inject)))
        if not self._first:
            return
        self._voice.note(opening(config, mesh))
        for injection in config.inject:
            arguments = f" {injection.arguments}" if injection.arguments else ""
            self._voice.note(
                f"!!! FAULT INJECTION IS ON !!! {Worker(injection.stage, injection.replica)}: "
                f"{injection.attack}{arguments} on {injection.direction} messages ({injection.where}) "
                f"from step {injection.start_step}. Never do this in a run whose weights you need."
            )

    def decided(self, step: int, what: Decision) -> None:
        """What became of requests for another action."""
        if not self._first:
            return
        for worker, action in what.unheeded:
            self._voice.once(
                "unheeded",
                f"step {step}: {worker} asks for action {action!r}, and that counts for nothing: of the first and the "
                "last stage alone, which are trusted, it does. Told once",
            )
        before = self._config.action
        if what.action is None or what.by is None or what.action == before:
            return
        others = "".join(
            f"; {worker} asked for {action!r}, and the lowest rank decides" for worker, action in what.others
        )
        self._voice.of_step(
            step,
            f"SETTINGS: action {what.action!r} in place of {before!r} from the next step on, as {what.by} asked"
            f"{f' in {CONTROL_FILE}' if what.file else ''}{others}",
        )
        source = "file" if what.file else "script"
        self._voice.event(step, events.Settings(what.action, str(before), what.by, source))

    def go_by(self, config: SentinelConfig) -> None:
        """Tell of settings that are others from the next step on."""
        self._config = config
        self._story.go_by(config)

    def verdict(self, verdict: Verdict) -> None:
        """What one step came to."""
        if not self._first:
            return
        every_step = self._config.events == "steps"
        for event in verdict_events(verdict, every_step, self._story.suspects, self._who, self._story.isolated):
            self._voice.event(verdict.step, event)
        if self._warming_up and not verdict.warming_up:
            self._voice.of_step(verdict.step, JUDGING)
        self._warming_up = verdict.warming_up
        self._story.step(verdict)

    def wiring(self, step: int, before: np.ndarray, wiring: np.ndarray) -> None:
        """Who serves another column from a step on; int64 [S, C] each."""
        if not self._first:
            return
        event = wiring_event(before, wiring)
        self._voice.event(step, event)
        if self._config.wiring == "heal":
            moves = ", ".join(f"{Worker(*move[:2])} to column {move[3]}" for move in event.moved)
            self._voice.of_step(step, f"columns dealt anew: {moves}")

    def exclusions(self, write: Callable[[], object]) -> None:
        """Have written which machines to leave out."""
        try:
            write()
        except (OSError, ValueError) as error:
            self._voice.note(f"cannot write which machines to leave out: {error}")

    def replaced(self, step: int, convict: Convict) -> None:
        """A state was taken over in which a worker is convicted in whose place another machine is now."""
        if not self._first:
            return
        worker, when = convict.worker, "" if convict.step is None else f" in step {convict.step}"
        self._voice.of_step(
            step,
            f"{convict}, convicted{when} of a run before, is not here: {worker} is in its place, and nothing is held "
            "against it",
        )
        self._voice.event(step, events.Replaced(*worker, before=str(convict)))

    def own_wiring(self) -> None:
        """A state was taken over whose columns others served."""
        if self._first:
            self._voice.note(
                'the state taken over is of columns dealt anew, and "wiring" is "static" here: they are '
                "DeepSpeed's own again, so convicted workers may stand in more of them than they did"
            )

    def left_out_of_evaluation(self, out_C: np.ndarray) -> None:
        """Columns that an evaluation's mean is without, bool [C]; on one rank, that need not be the first."""
        columns = ", ".join(map(str, np.flatnonzero(out_C)))
        self._voice.once(
            "evaluation",
            f"an evaluation's mean leaves out columns with convicted workers, here {columns}: their data are not in "
            "it. Told once",
        )

    def misfit(self, step: int, worker: Worker) -> None:
        """A worker's mean for the baseline that cannot be."""
        if not self._first:
            return
        self._voice.of_step(
            step,
            f"{worker} told the other replicas of its stage a mean that no message of the size it reported can have, "
            "and its messages were clean: it lies, or it miscalculates. It counted for nothing",
        )
        self._voice.event(step, events.Misfit(*worker))

    def weights(self, comparison: Comparison, found: Sequence[Division], action: str) -> None:
        """Replicas that hold different weights, and what was done; see ``weights_events``."""
        if not self._first:
            return
        for worker in comparison.unequal:
            (of_stage,) = (one for one in found if one.stage == worker.stage)
            self._voice.of_step(
                comparison.step,
                f"{worker} holds other weights or optimizer state than most replicas of its stage: "
                f"{_UNEQUAL[action]} ({of_stage})",
            )
        for one in found:
            if one.stage in comparison.undecided:
                self._voice.of_step(
                    comparison.step, f"weights differ, and no more than half of the replicas agree: {one}"
                )
        for event in weights_events(comparison, found, action):
            self._voice.event(comparison.step, event)

    def poisoned(self, what: Poisoned) -> None:
        """A reduction that gave something else than it must."""
        if not self._first:
            return
        self._voice.of_step(what.step, str(what))
        self._voice.event(what.step, events.Poison(list(what.stages), what.named))

    def device(self, step: int, what: Standing | Above) -> None:
        """A device that people should look at."""
        if not self._first:
            return
        why = (
            "more alarms than its peers, which convicts nobody"
            if isinstance(what, Above)
            else "PROVED BEFORE to have done or reported something wrong"
        )
        self._voice.of_step(step, f"{why}: {what}")
        self._voice.event(step, device_event(what))

    def ledger(self, lines: Sequence[str]) -> None:
        """What is out of the ordinary about the ledger."""
        for line in lines if self._first else ():
            self._voice.note(line)

    def unwritten(self, error: OSError) -> None:
        """The ledger's file cannot be written to."""
        if self._first:
            self._voice.once(
                "unwritten",
                f"the ledger of devices cannot be written: {error}. Counts stay in memory and in checkpoints, and are "
                "written as soon as it can be; told once",
            )

    def replayed(self, step: int, inconsistent: Sequence[Worker]) -> None:
        """Who made two things of the same."""
        if not self._first:
            return
        for worker in inconsistent:
            self._voice.of_step(
                step, f"PROVED: computing the same step twice, {worker} made something else of it the second time"
            )
            self._voice.event(step, events.Replayed(*worker))

    def unseen(self, problem: str | None) -> None:
        """What this rank, whichever it is, could not judge at first and lets pass."""
        if problem:
            self._voice.once("unseen", f"not judged: {problem} Told once; with this action it passes")

    def split(self, text: str) -> None:
        """Ranks that do not come to the same verdict, where none is acted on."""
        if self._first:
            self._voice.once("split", f"{text} From here on they may report different things; told once")

    def anew(self, parts: int, before: int) -> None:
        """A state that was taken over and does not fit the messages."""
        if self._first:
            self._voice.note(
                f"messages have {parts} judged parts, and the state taken over is of {before}: fences and "
                f"convictions start anew, with {self._config.warmup_steps} steps of warm-up"
            )
