"""Who holds up a run that stands still, by where every rank says that it is.

Where nothing raises (NCCL: a host that waits for its device learns of nothing), all a rank can see is that it does not
get on. Then it looks where the others are:

    in RecvActivation, SendGrad     a rank waits for the worker of its column in the stage before
    in SendActivation, RecvGrad     for that in the stage behind
    in ReduceTiedGrads (the gate of Sentinel), ReduceGrads, OptimizerStep, at the beginning and at the end of a call
                                    for all ranks that have not come there yet
    anywhere else                   for nobody: it computes, loads data, or is in the script's own code

Who is awaited and waits for nobody *holds the run up*. Whose heartbeat has stopped is *silent*. Example, two stages,
two replicas: (0, 0) in LoadMicroBatch, (1, 0) in RecvActivation, (0, 1) and (1, 1) in ReduceTiedGrads: all wait for
(0, 0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.engine.progress import OUTSIDE, PIPELINE, Place
from deepspeed_sentinel.mesh import Worker, columns_of

_FROM_BEFORE = ("RecvActivation", "SendGrad")
_FROM_BEHIND = ("SendActivation", "RecvGrad")


@dataclass(frozen=True)
class Beat:
    """A heartbeat: how many came before, and where its rank was; ``ended`` is the last one of a run or script."""

    count: int
    place: Place
    ended: bool = False

    def to_text(self) -> str:
        return f"{self.count} {int(self.ended)} {self.place.to_text()}"

    @staticmethod
    def from_text(text: str) -> Beat | None:
        """None if it is none."""
        try:
            count, ended, place = text.split(" ", 2)
            return Beat(int(count), Place.from_text(place), bool(int(ended)))
        except ValueError:
            return None


def waits(place: Place) -> bool:
    """Whether a rank that stands still there waits for others."""
    return place.what in _FROM_BEFORE + _FROM_BEHIND or place.phase not in (PIPELINE, OUTSIDE)


class Standstill:
    """Adds up how long a run has stood still, and says who holds it up once that is longer than patience lasts.

    Seconds are those that this rank was awake to see: one that was suspended must not take the others for silent.

    Args:
        workers: of all ranks.
        rank: this one.
        silence: seconds without a heartbeat after which a rank is gone, if nobody else holds the run up.
        patience: seconds for a place in which this rank waits, after which whoever holds it up is stuck.
        wiring: int64 [S, C] of a global step.
    """

    def __init__(
        self,
        workers: Mapping[int, Worker],
        rank: int,
        silence: float,
        patience: Callable[[Place], float],
        wiring: Callable[[int], np.ndarray],
    ) -> None:
        self._workers, self._rank = workers, rank
        self._ranks = {worker: other for other, worker in workers.items()}
        self._silence, self._patience, self._wiring = silence, patience, wiring
        self.forget()

    def forget(self) -> None:
        """This rank gets on."""
        self._still = 0.0
        self._places: dict[int, Place] = {}
        self._counts: dict[int, int] = {}
        self._silent: dict[int, float] = {}

    def look(self, seconds: float, beats: Mapping[int, Beat]) -> str | None:
        """Who holds the run up, if it has stood still for too long.

        Args:
            seconds: since the last look.
            beats: the last heartbeat of each rank.
        """
        for rank in self._workers:
            beat = beats.get(rank)
            alive = beat is not None and not beat.ended and beat.count > self._counts.get(rank, -1)
            self._silent[rank] = 0.0 if alive else self._silent.get(rank, 0.0) + seconds
            if beat is not None and alive:
                self._counts[rank] = beat.count
        places = {rank: beat.place for rank, beat in beats.items()}
        moved = any(self._places.get(rank) != place for rank, place in places.items())
        self._places |= places
        self._still = 0.0 if moved else self._still + seconds
        mine = self._places.get(self._rank)
        if mine is None or not waits(mine):
            return None
        silent = [
            rank for rank, for_seconds in self._silent.items() if for_seconds >= self._silence and rank != self._rank
        ]
        awaited = {other for rank in self._workers if rank not in silent for other in self._awaited(rank)}
        known = awaited.intersection(self._places).difference(silent)
        holding = sorted(rank for rank in known if not waits(self._places[rank]))
        if silent and not holding and self._still >= self._silence:
            return self._gone(silent)
        if self._still >= self._patience(mine):
            return self._stuck(silent, holding)
        return None

    def _awaited(self, rank: int) -> set[int]:
        """The ranks that a rank waits for."""
        place, worker = self._places.get(rank), self._workers[rank]
        if place is None or not waits(place):
            return set()
        if place.phase == PIPELINE:
            stage = worker.stage + (-1 if place.what in _FROM_BEFORE else 1)
            wiring = self._wiring(place.step)
            if not 0 <= stage < len(wiring):
                return set()
            return {self._ranks[Worker(stage, int(wiring[stage, columns_of(wiring)[worker]]))]}
        here = (place.call, place.phase)
        return {other for other, there in self._places.items() if (there.call, there.phase) < here}

    def _gone(self, silent: list[int]) -> str:
        names = ", ".join(map(self.name, silent))
        seen = "; ".join(f"rank {rank} was last seen in {self._places.get(rank, 'no place')}" for rank in silent)
        return f"lost {names}: no heartbeat for {self._silence:.0f} s, and everybody waits ({seen}). {self._advice()}"

    def _stuck(self, silent: list[int], holding: list[int]) -> str:
        how_long = f"no rank got on for {self._still:.0f} s"
        if holding or silent:
            names = ", ".join(
                f"{self.name(rank)} in {self._places.get(rank, 'no place')}{' without a heartbeat' * (rank in silent)}"
                for rank in sorted({*silent, *holding})
            )
            return f"stuck: {names}, for which the others wait; {how_long}. {self._advice()}"
        last = min((place.call, place.phase) for place in self._places.values())
        where = ", ".join(
            f"{self.name(rank)} in {place}"
            for rank, place in sorted(self._places.items())
            if (place.call, place.phase) == last
        )
        nobody = "ranks wait for each other, so none is named; furthest behind"
        return f"stuck: {nobody}: {where}; {how_long}. {self._advice()}"

    def _advice(self) -> str:
        return f"Resume from the last checkpoint. {self.name(self._rank)} waited in {self._places[self._rank]}"

    def name(self, rank: int) -> str:
        return f"rank {rank} = {self._workers[rank]}"
