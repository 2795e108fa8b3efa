"""Proof by several partners: who contradicts more workers of one stage than can be bad is bad itself.

Between two workers something is *unsettled* where one of the two must be bad, and nobody can tell which:

* the two ends of a link report other contents of a message;
* the two neighbours of a worker report other numbers of what entered and left it, which both have computed from the
  same sketches;
* two workers of a stage made other things of the same, in a twin step without a majority.

It is remembered for some steps. Of a stage's R workers fewer than half are bad, at most f = (R - 1) // 2, those
included that had a fault once in that time and are not convicted. An honest worker is at odds with bad ones alone, so
with f of one stage at most: who is at odds with more than f of one stage is bad. With whom is convicted nothing is
unsettled: it may act beside another fault of its stage. Columns are dealt so that those between whom something is
unsettled get other partners, so who keeps lying is convicted after f + 1 steps in which it did. With fewer than three
replicas nobody is.

Worked example, three replicas, f = 1, in column 0 the workers (1, 0) and (2, 0), and (1, 0) lies about what it gets:

    step 10    link 1, column 0: (1, 0) and (2, 0) are at odds; one of them is bad
    step 11    dealt anew: (1, 0) stands before (2, 1), and is at odds with it. (2, 0) stands behind (1, 1), in peace
               (1, 0) is at odds with two workers of stage 2, and one at most is bad: (1, 0) is convicted

Numbers that rest on a baseline count for nothing here: each end has a copy of its own, and bad workers of a stage can
move it. Nor does a neighbour that has nothing to say (``silence.py``): the worker between may have brought it about.
Both go to ``isolation.py``, which convicts nobody.
What is unsettled within a stage counts only where two of its workers have made the very same of the same before:
replicas whose work is not the same bit for bit differ and are honest. Where more of a stage's workers would be
convicted by each other than can be bad, that is refuted: nobody is, and nothing within that stage counts until some of
its workers make the same again. What does not count goes to ``isolation.py`` as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.judgement.passing import leaving
from deepspeed_sentinel.judgement.trial import Trial
from deepspeed_sentinel.mesh import Mesh, Worker

_LEAST_REPLICAS = 3
_REACH = 3  # the same stage, the next, the next but one


@dataclass(frozen=True)
class Contradicted:
    """A worker that contradicts more workers of one stage than can be bad.

    Attributes:
        worker: who.
        partners: whom, all of one stage.
    """

    worker: Worker
    partners: tuple[Worker, ...]

    def __str__(self) -> str:
        return f"PROVED: {self.in_words()}"

    def in_words(self) -> str:
        """What was seen, and what follows from it."""
        return (
            f"{at_odds(self.worker, self.partners)}. Each time one of the two must be bad, and that many workers of "
            f"stage {self.partners[0].stage} cannot be: so it is {self.worker}"
        )


def at_odds(worker: Worker, partners: Sequence[Worker], name: str = "") -> str:
    """What is unsettled between a worker, called by a name if there is one, and each of some others of one stage."""
    name = name or str(worker)
    others = " and ".join(map(str, partners))
    near, far = sorted((worker.stage, partners[0].stage))
    if near == far:
        return f"given the same micro-batches, {name} made something else than {others}"
    if far == near + 1:
        return f"{name} reports other contents of messages over link {near} than {others}"
    return f"{name} reports other numbers of what entered and left stage {near + 1} than {others}"


class Unsettled:
    """What is unsettled between which workers.

    Args:
        mesh: stages and replicas.
        memory: steps for which it is remembered.

    Attributes:
        found: two by two, between whom something was unsettled in the last step.
        news: whether any of it was not remembered before.
    """

    def __init__(self, mesh: Mesh, memory: int) -> None:
        self._mesh = mesh
        self._memory = memory
        # [d, s, r, q]: for how many steps to remember what is between (s, r) and (s + d, q)
        self._left = np.zeros((_REACH, mesh.stages, mesh.replicas, mesh.replicas), np.int64)
        self._alike = np.zeros(mesh.stages, bool)
        self.found: tuple[tuple[Worker, Worker], ...] = ()
        self.news = False

    @property
    def doubted(self) -> np.ndarray:
        """Those of ``found``, bool [S, R]."""
        doubted = np.zeros((self._mesh.stages, self._mesh.replicas), bool)
        for pair in self.found:
            for worker in pair:
                doubted[worker] = True
        return doubted

    def step(
        self,
        served: np.ndarray,
        by_ends: np.ndarray,
        by_neighbours: np.ndarray,
        trial: Trial | None,
        convicted: np.ndarray,
    ) -> tuple[Contradicted, ...]:
        """Enter one step.

        Args:
            served: int [S, C], who served each column.
            by_ends: bool [2, L, C], where the two ends of a link differ in what crossed it.
            by_neighbours: bool [2, L, C], where the two neighbours of a link's sender differ about it.
            trial: of a twin step, or None.
            convicted: bool [S, R], before this step.

        Returns:
            workers of middle stages that contradict too many, without those convicted that did not in this step.
        """
        if not (trial or self._left.any() or by_ends.any() or by_neighbours.any()):
            self.news, self.found = False, ()
            return ()
        new = self._between(served, by_ends, by_neighbours, trial)
        if trial:
            self._alike = (self._alike | trial.sound.any(1)) & ~trial.unlike
        self.news = bool((new & (self._left == 0)).any())
        self._left = np.where(new, self._memory, np.maximum(self._left - 1, 0))
        # One that contradicts too many of several stages is named once.
        found = tuple({liar.worker: liar for liar in self._too_many(new, convicted)}.values())
        known = convicted.copy()
        for liar in found:
            known[liar.worker] = True
        self.found = tuple(self._open(new, known))
        return found

    def uncounted(self, trial: Trial) -> np.ndarray:
        """bool [events, S, R], who differed in a twin step where that counts for nothing here, two by two."""
        counts_nothing = ~(self._alike | trial.unlike)[:, None, None]
        stage, one, other = np.nonzero(trial.differ & counts_nothing)
        first = one < other
        events = np.zeros((np.count_nonzero(first), self._mesh.stages, self._mesh.replicas), bool)
        for workers in (one, other):
            events[np.arange(len(events)), stage[first], workers[first]] = True
        return events

    def pairs(self, convicted: np.ndarray) -> tuple[tuple[Worker, Worker], ...]:
        """Between whom something is unsettled: where one of the two is convicted (bool [S, R]), nothing is."""
        return tuple(self._open(self._left > 0, convicted))

    def forget(self, worker: Worker) -> None:
        """Nothing is unsettled with a worker, since it is another one than before."""
        self._left[:, worker.stage, worker.replica] = 0
        for distance in range(min(_REACH, worker.stage + 1)):
            self._left[distance, worker.stage - distance, :, worker.replica] = 0

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"left": self._left.copy(), "alike": self._alike.copy()}

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of what a state may hold, by name."""
        return {"left": (0.0, float(self._memory))}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._left, self._alike = np.array(state["left"]), np.array(state["alike"])
        for distance in range(1, _REACH):
            self._left[distance, max(self._mesh.stages - distance, 0) :] = 0  # there is no such stage

    def _between(
        self, served: np.ndarray, by_ends: np.ndarray, by_neighbours: np.ndarray, trial: Trial | None
    ) -> np.ndarray:
        """bool [d, S, R, R], as what is remembered."""
        new = np.zeros(self._left.shape, bool)
        for distance, where in ((1, by_ends), (2, leaving(by_neighbours))):
            stage, column = np.nonzero(where.any(0))
            new[distance, stage, served[stage, column], served[stage + distance, column]] = True
        if trial:
            new[0] = trial.differ & ~trial.unlike[:, None, None]
        return new

    def _too_many(self, new: np.ndarray, convicted: np.ndarray) -> Iterator[Contradicted]:
        if self._mesh.replicas < _LEAST_REPLICAS or not self._left.any():
            return
        left, bad = self._left > 0, (self._mesh.replicas - 1) // 2
        for stage in range(1, self._mesh.stages - 1):
            for other, between, now in zip(*self._of(stage, left), self._of(stage, new)[1], strict=True):
                if other == stage and not self._alike[stage]:
                    continue
                of_stage = between & ~convicted[other]
                contradicts = np.count_nonzero(of_stage, axis=1) > bad
                if other == stage and np.count_nonzero(contradicts) > bad:
                    self._alike[stage] = False
                    continue
                guilty = contradicts & (now.any(1) | ~convicted[stage])
                for replica in np.flatnonzero(guilty).tolist():
                    partners = np.flatnonzero(of_stage[replica]).tolist()
                    yield Contradicted(Worker(stage, replica), tuple(Worker(other, partner) for partner in partners))

    def _of(self, stage: int, between: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
        """The stages within reach of one, and what is between it and each of them, bool [R, R]."""
        before = [stage - distance for distance in range(1, _REACH) if stage - distance >= 0]
        behind = [stage + distance for distance in range(_REACH) if stage + distance < self._mesh.stages]
        arrays = [between[stage - other, other].T for other in before]
        return before + behind, arrays + [between[other - stage, stage] for other in behind]

    def _open(self, between: np.ndarray, convicted: np.ndarray) -> Iterator[tuple[Worker, Worker]]:
        """Pairs of which neither is convicted, and which are not both in a trusted stage."""
        for distance, stage, replica, partner in np.argwhere(between).tolist():
            one, other = Worker(stage, replica), Worker(stage + distance, partner)
            trusted = self._mesh.is_trusted(one.stage) and self._mesh.is_trusted(other.stage)
            if one < other and not (convicted[one] or convicted[other] or trusted):
                yield one, other
