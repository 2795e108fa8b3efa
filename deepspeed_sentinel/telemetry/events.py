"""Events: what a run has to tell, one frozen dataclass a kind; docs/events.md lists them, and a test compares.

An event is written as one JSON object a line (``eventlog.py``): its kind, step and time, its own fields, and under
``who`` each worker that it names, with rank, host and device. In fields a worker is [stage, replica].

Adding a field or a kind leaves ``SCHEMA_VERSION`` as it is; taking one away, or giving it another meaning, raises it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from deepspeed_sentinel.mesh import Worker

SCHEMA_VERSION = 1
EVENTS: dict[str, type[Event]] = {}  # every kind there is


@dataclass(frozen=True)
class Event:
    """Something to tell of one step."""

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str = "") -> None:
        if kind:
            cls.kind = kind
            EVENTS[kind] = cls

    def named(self) -> tuple[Worker, ...]:
        """The workers that it names, each once, in the order of its fields."""
        return tuple(dict.fromkeys(worker for field in fields(self) for worker in _workers(getattr(self, field.name))))


@dataclass(frozen=True)
class _OfWorker(Event):
    stage: int
    replica: int

    def named(self) -> tuple[Worker, ...]:
        return (Worker(self.stage, self.replica), *super().named())


@dataclass(frozen=True)
class Start(Event, kind="start"):
    """The engine is watched from here on.

    Attributes:
        mesh: stages and replicas.
        config: the effective settings, as the config block has them.
        injecting: faults are injected on purpose.
    """

    mesh: dict[str, int]
    config: dict[str, Any]
    injecting: bool

    def named(self) -> tuple[Worker, ...]:
        """All of the mesh."""
        stages, replicas = self.mesh["stages"], self.mesh["replicas"]
        return tuple(Worker(stage, replica) for stage in range(stages) for replica in range(replicas))


@dataclass(frozen=True)
class Settings(Event, kind="settings"):
    """Settings are others from the next step on, see docs/monitoring.md.

    Attributes:
        action: that steps are judged by from then on.
        before: by which this one was.
        asked_by: whose request it was.
        source: "script" or "file".
    """

    action: str
    before: str
    asked_by: Worker
    source: str


@dataclass(frozen=True)
class Step(Event, kind="step"):
    """A step was judged; with "events": "steps" alone.

    Attributes:
        scores: of each stage's replicas, the score of the worst message a worker sent; 1 is on the fence, 0 nothing
            was judged, and none is above 1e9.
        excluded: columns left out.
        warming_up: the fences are still learning.
    """

    scores: list[list[float]]
    excluded: list[int]
    warming_up: bool


@dataclass(frozen=True)
class Alarm(_OfWorker, kind="alarm"):
    """Messages of a worker are outside the fences, and it is the first on their way.

    Attributes:
        stage, replica: who sent them.
        direction: "forward" or "backward".
        link: between stage ``link`` and the next.
        micro_batches: which.
        statistic: the one that is furthest outside, see docs/statistics.md.
        value: of that statistic, in its own unit.
        residual, low, high: what was compared, and its fences.
        score: distance over the fence's; above 1 is outside, none is above 1e9.
        trusted: a worker of the first or last stage, never convicted.
        overflow: fp16 loss scaling may explain it.
        cause: "fences", "sums" or "later alarms".
        strikes: it counts against the worker.
        audit: "confirmed" or "open"; null without one.
    """

    direction: str
    link: int
    micro_batches: list[int]
    statistic: str
    value: float
    residual: float
    low: float
    high: float
    score: float
    trusted: bool
    overflow: bool
    cause: str
    strikes: bool
    audit: str | None


@dataclass(frozen=True)
class Disputed(Event, kind="dispute"):
    """Two workers report different things about messages of one column.

    Attributes:
        link, direction, column: where the messages crossed.
        sender, receiver: who contradict each other.
        about: the worker between them that it is about; null where they are the two ends of the link.
        micro_batches: which messages.
        audit: "refuted", "false" or "unheard"; null without one.
        at_fault: which of the two, if an audit tells.
    """

    link: int
    direction: str
    column: int
    sender: Worker
    receiver: Worker
    about: Worker | None
    micro_batches: list[int]
    audit: str | None
    at_fault: Worker | None


@dataclass(frozen=True)
class Excluded(Event, kind="excluded"):
    """Columns are left out of the step.

    Attributes:
        columns: which.
    """

    columns: list[int]


@dataclass(frozen=True)
class Suspicion(_OfWorker, kind="suspicion"):
    """A worker is a suspect from this step on.

    Attributes:
        stage, replica: who.
        why: the evidence, in words.
    """

    why: str


@dataclass(frozen=True)
class TwinStep(Event, kind="twins"):
    """It was a twin step.

    Attributes:
        suspects: who is a suspect after it.
        inexact: who says that it runs on another kind of hardware than most of its stage, and made other bits of the
            same. What its messages come to is held to the others' by statistics, and its column is left out of the
            step.
    """

    suspects: tuple[Worker, ...]
    inexact: tuple[Worker, ...] = ()


@dataclass(frozen=True)
class Proved(_OfWorker, kind="proof"):
    """A worker made something else of the same than a majority of its stage.

    Attributes:
        stage, replica: who.
        column: which it served.
        of: "forward", "backward" or "gradients": what differs.
        micro_batches: which messages differ; empty for gradients.
        agreeing, compared: how many workers made the same of it, of how many.
        trusted: a worker of the first or last stage, never convicted.
    """

    column: int
    of: str
    micro_batches: list[int]
    agreeing: int
    compared: int
    trusted: bool


@dataclass(frozen=True)
class Contradiction(_OfWorker, kind="contradicted"):
    """A worker contradicts more workers of one stage than can be bad: proved.

    Attributes:
        stage, replica: who.
        partners: whom.
    """

    partners: tuple[Worker, ...]


@dataclass(frozen=True)
class Differing(Event, kind="difference"):
    """Workers made different things of the same, and no majority tells who is wrong.

    Attributes:
        workers: who.
        of: "forward", "backward" or "gradients": what differs.
        as_received: they say the same of it, and the workers behind them received different messages.
    """

    workers: tuple[Worker, ...]
    of: str
    as_received: bool


@dataclass(frozen=True)
class Cleared(_OfWorker, kind="cleared"):
    """A suspect did what its stage does in a twin step.

    Attributes:
        stage, replica: who.
    """


@dataclass(frozen=True)
class Conviction(_OfWorker, kind="conviction"):
    """A worker is convicted; health.jsonl gets a record of it.

    Attributes:
        stage, replica: who.
        why: the evidence, in words.
        proved: by exact comparison or contradiction, not by statistics alone.
    """

    why: str
    proved: bool


@dataclass(frozen=True)
class Release(_OfWorker, kind="release"):
    """A conviction is lifted; the worker is on probation.

    Attributes:
        stage, replica: who.
    """


@dataclass(frozen=True)
class Isolated(Event, kind="isolated"):
    """Who is kept where columns are lost, unproved, has changed: somebody there keeps columns out. It convicts nobody.

    Attributes:
        workers: who, from this step on; empty where nobody is any more.
    """

    workers: tuple[Worker, ...]


@dataclass(frozen=True)
class Skipped(Event, kind="skipped"):
    """The optimizer did not step."""


@dataclass(frozen=True)
class Halt(Event, kind="halt"):
    """Training stops on purpose, with a checkpoint.

    Attributes:
        reason: in words.
    """

    reason: str


@dataclass(frozen=True)
class Dealt(Event, kind="wiring"):
    """Workers serve other columns from this step on.

    Attributes:
        moved: stage, replica, column before and column now of each that moves.
    """

    moved: list[list[int]]

    def named(self) -> tuple[Worker, ...]:
        return tuple(Worker(stage, replica) for stage, replica, *_ in self.moved)


@dataclass(frozen=True)
class Weights(Event, kind="weights"):
    """Replicas hold different weights or optimizer state.

    Attributes:
        stage: whose.
        replica: who holds others than a majority; null where there is no majority.
        action: "healed", "unhealed", "reported" or "stopped".
        groups: replicas that hold the same, where there is no majority; else null.
    """

    stage: int
    replica: int | None
    action: str
    groups: list[list[int]] | None = None

    def named(self) -> tuple[Worker, ...]:
        everyone = sorted(replica for group in self.groups or [] for replica in group)
        replicas = everyone if self.replica is None else [self.replica]
        return tuple(Worker(self.stage, replica) for replica in replicas)


@dataclass(frozen=True)
class Poison(Event, kind="poisoned"):
    """A reduction of gradients gave something else than it must; the step is not applied.

    Attributes:
        stages: whose reduction.
        workers: who handed over something else than most; empty where nobody is shown to have.
    """

    stages: list[int]
    workers: tuple[Worker, ...]


@dataclass(frozen=True)
class Replayed(_OfWorker, kind="replay"):
    """A worker that computed a step twice made two things of it: proved.

    Attributes:
        stage, replica: who.
    """


@dataclass(frozen=True)
class Misfit(_OfWorker, kind="misfit"):
    """A worker told its stage a mean that its messages cannot have; it counted for nothing.

    Attributes:
        stage, replica: who.
    """


@dataclass(frozen=True)
class Replaced(_OfWorker, kind="replaced"):
    """A checkpoint was loaded, and another machine is in a convicted worker's place: nothing is held against it.

    Attributes:
        stage, replica: the place, with the machine that is there now.
        before: who was convicted there, with host and device, in words.
    """

    before: str


@dataclass(frozen=True)
class DeviceNote(Event, kind="device"):
    """A device that people should look at, see docs/ledger.md.

    Attributes:
        why: "proof" before, or "rate" of alarms above its peers'.
        device: the name by which it is kept.
        place: where it was last, in words.
        workers: who runs on it in this run.
        steps, judged, alarmed_steps, alarms, disputes, proofs, unequal_weights: its counts over all runs.
        first, last, trouble: when something was counted, and trouble last, in seconds since 1970; 0 for never.
        peers: for a rate, the share of steps in which the others were in alarm; else null.
        chance: for a rate, that of as many alarms at twice its peers' rate; else null.
    """

    why: Literal["proof", "rate"]
    device: str
    place: str
    workers: tuple[Worker, ...]
    steps: int
    judged: int
    alarmed_steps: int
    alarms: int
    disputes: int
    proofs: int
    unequal_weights: int
    first: int
    last: int
    trouble: int
    peers: float | None
    chance: float | None


@dataclass(frozen=True)
class End(Event, kind="end"):
    """The run ends, or the engine is no longer watched.

    Attributes:
        counts: steps, judged_messages, alarms, disputes, excluded_column_steps, skipped_steps.
        convicted: who is convicted.
        since_conviction: alarms, disputes and proofs of each convicted worker since: stage, replica, how many.
    """

    counts: dict[str, int]
    convicted: tuple[Worker, ...]
    since_conviction: list[list[int]]


def _workers(value: Any) -> Iterator[Worker]:
    if isinstance(value, Worker):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _workers(one)
