"""Who is kept where columns are lost, without a conviction, because somebody there keeps columns out unproved.

Some events leave a column out and prove nothing: the ends of a link report other numbers to a baseline, of which each
has a copy; a neighbour has nothing to say; a worker is accused by its neighbours' sketches alone, and a twin step or an
audit clears it. Who lies so is never convicted, and would keep a column out for ever. But of each such event one thing
is known: among the few workers *involved* in it, at least one is bad.

So the smallest explanation is looked for: workers, as few of any one stage as possible and never more than f, such that
each event remembered involves one of them or a convicted one. These are *isolated*: dealt into the columns in which
convicted workers stand, or would (``Doubts.packed``). An honest one may be among them. It costs nothing but its place.

Why that is enough, f = (R - 1) // 2 and fewer than half of each stage bad: the bad are an explanation themselves. So
the smallest takes K columns, K no more than there are bad ones of one stage. An event in another column is of none of
those isolated, hence new, and refutes the explanation. A bad worker x that was outside of it cannot be at odds with
more than K of one stage, since each of those would be inside. So with both ends of a link involved, n bad workers in
all keep no more than n (2 f + 1) columns out beyond the K, ever, as long as all is remembered. Where three are involved
it is n (6 f R + 1).

An event is remembered for some steps, and anew whenever somebody isolated for it is involved in another. Events that
cannot be explained by f a stage come of something else (a broken first stage, more bad workers); the older half of
them is forgotten then, and for as many steps none is news.

Worked example, 6 stages x 3 replicas, f = 1, columns as DeepSpeed's own. In one step (0, 0) and (1, 0), (1, 1) and
(2, 1), (2, 2) and (3, 2) report other numbers to a baseline, and no column is left. Stage 0 is trusted, so (1, 0) is
isolated; then not (1, 1), which would be two of stage 1, but (2, 1), and for the same reason (3, 2). The next step has
all three in column 0, and two columns without any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from deepspeed_sentinel.mesh import Mesh, Worker, columns_of

_LEAST_REPLICAS = 3
_MOST_EVENTS = 512  # remembered; the oldest give way
_MOST_TRIES = 400  # of one search; beyond, one more of a stage is allowed
_NOBODY, _DISPUTE, _ALARM = -1, -1, -2

Event = tuple[Worker, ...]


class Isolation:
    """What is remembered of unproved events, and whom the smallest explanation isolates.

    Args:
        mesh: stages and replicas.
        memory: steps for which a dispute is remembered.
        patience: steps for which an alarm is, which honest workers have at times.
        acts: columns are dealt anew. Otherwise, and with fewer than three replicas, nobody is ever isolated.

    Attributes:
        isolated: bool [S, R], workers of middle stages, none of them convicted.
        news: whether the last step had an event that was not explained.
    """

    def __init__(self, mesh: Mesh, memory: int, patience: int, acts: bool) -> None:
        self._mesh = mesh
        self._memory, self._patience = memory, patience
        self._acts = acts and mesh.replicas >= _LEAST_REPLICAS
        # A row an event: the replica of each stage that is involved or _NOBODY; its kind, or the stage of who has to be
        # cleared for it to be one; steps to remember it.
        self._events = np.zeros((0, mesh.stages + 2), np.int64)
        self._unexplained = 0  # steps for which nothing is news
        self.isolated = np.zeros((mesh.stages, mesh.replicas), bool)
        self.news = False

    def step(
        self,
        served: np.ndarray,
        involved: np.ndarray,
        unblamed: np.ndarray,
        accused: Iterable[tuple[Worker, int]],
        cleared: np.ndarray,
        convicted: np.ndarray,
        changed: bool,
    ) -> None:
        """Enter one step.

        Args:
            served: int [S, C], who served each column.
            involved: bool [events, S, C], who is involved in each, by column; none where nothing is marked.
            unblamed: bool [C], columns in alarm for which nobody can be blamed.
            accused: workers accused by their neighbours' sketches alone, and the columns that they served.
            cleared: bool [S, R], suspects that a twin step has cleared.
            convicted: bool [S, R], after this step.
            changed: they are not those of the last step.
        """
        self.news = False
        if not self._acts:
            return
        self._unexplained = max(self._unexplained - 1, 0)
        self._events[:, -1] -= 1
        for event, column in np.argwhere(involved[:, 1:-1].any(1)).tolist():
            changed |= self._enter(involved[event, :, column], served[:, column], _DISPUTE, convicted)
        for column in np.flatnonzero(unblamed).tolist():
            changed |= self._enter(np.ones(self._mesh.stages, bool), served[:, column], _ALARM, convicted)
        for worker, column in accused:
            beside = np.abs(np.arange(self._mesh.stages) - worker.stage) <= 1
            self._enter(beside, served[:, column], worker.stage, convicted)
        changed |= self._clear(cleared)
        kept = self._events[:, -1] > 0
        self._events = self._events[kept]
        if changed or not kept.all():
            self._explain(convicted)

    def beside(self, served: np.ndarray) -> np.ndarray:
        """bool [S, R], who is isolated or serves (int [S, C]) a column next to one who is."""
        here = np.take_along_axis(self.isolated, served, 1)
        near = here.copy()
        near[1:] |= here[:-1]
        near[:-1] |= here[1:]
        return np.take_along_axis(near, columns_of(served), 1)

    def clear(self, worker: Worker, convicted: np.ndarray) -> None:
        """Somebody accused was cleared otherwise: who stood beside it is at odds with it."""
        cleared = np.zeros_like(self.isolated)
        cleared[worker] = True
        if self._acts and self._clear(cleared):
            self._explain(convicted)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "events": self._events.copy(),
            "unexplained": np.array(self._unexplained),
            "isolated": self.isolated.copy(),
        }

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of what may be negative in a state."""
        largest = max(self._mesh.stages, self._mesh.replicas, self._memory)
        return {"events": (float(_ALARM), float(largest)), "unexplained": (0.0, float(self._memory))}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        events = np.array(state["events"])
        replicas, kind = events[:, :-2], events[:, -2]
        possible = ((replicas >= _NOBODY) & (replicas < self._mesh.replicas)).all(1) & (kind < self._mesh.stages)
        self._events = events[possible]
        self._unexplained, self.isolated = int(state["unexplained"]), np.array(state["isolated"])

    def _enter(self, involved: np.ndarray, served: np.ndarray, kind: int, convicted: np.ndarray) -> bool:
        """Whether an event (bool [S], int [S]) has to be explained anew."""
        middle = involved.copy()
        middle[[0, -1]] = False
        stages = np.flatnonzero(middle)
        replicas = served[stages]
        if not stages.size or convicted[stages, replicas].any():
            return False
        known = self.isolated[stages, replicas]
        if known.any():
            again = (self._events[:, stages[known]] == replicas[known]).any(1)
            for of_kind in (_DISPUTE, _ALARM):
                self._events[again & (self._events[:, -2] == of_kind), -1] = self._steps(of_kind)
            return False
        row = np.full(self._mesh.stages + 2, _NOBODY, np.int64)
        row[stages] = replicas
        row[-2:] = kind, self._steps(kind)
        same = (self._events[:, :-1] == row[:-1]).all(1)
        self._events = np.concatenate([self._events[~same], row[None]])[-_MOST_EVENTS:]
        return kind < 0

    def _clear(self, cleared: np.ndarray) -> bool:
        """What stands for whether somebody (bool [S, R]) is cleared becomes an event."""
        stages = self._events[:, -2]
        found = np.flatnonzero(stages >= 0)
        found = found[cleared[stages[found], self._events[found, stages[found]]]]
        self._events[found, -2:] = _ALARM, self._steps(_ALARM)
        return bool(found.size)

    def _steps(self, kind: int) -> int:
        return self._memory if kind == _DISPUTE else self._patience

    def _explain(self, convicted: np.ndarray) -> None:
        rows = self._events
        stages, replicas = np.arange(self._mesh.stages), rows[:, :-2]
        self._events = rows[~((replicas != _NOBODY) & convicted[stages, replicas]).any(1)]
        found = None
        while found is None:
            open_rows = np.flatnonzero(self._events[:, -2] < 0)
            events = [
                tuple(Worker(stage, int(row[stage])) for stage in np.flatnonzero(row != _NOBODY).tolist())
                for row in self._events[open_rows, :-2]
            ]
            found = self._smallest(events, np.count_nonzero(convicted, axis=1))
            if found is None:
                kept = np.ones(len(self._events), bool)
                kept[open_rows[: (len(events) + 1) // 2]] = False
                self._events = self._events[kept]
                self._unexplained = self._memory
        before = self.isolated
        self.isolated = np.zeros_like(convicted)
        for worker in found:
            self.isolated[worker] = True
        self.news = not self._unexplained and bool((self.isolated & ~before).any())

    def _smallest(self, events: list[Event], convicted: np.ndarray) -> frozenset[Worker] | None:
        """Workers of which each event has one, with those convicted (int [S]) as few of any stage as possible."""
        least, most = int(convicted.max()), (self._mesh.replicas - 1) // 2
        for number in range(max(least, bool(events)), max(least, most) + 1):
            found = self._search(events, (number - convicted).tolist())
            if found is not None:
                return found
        return None

    def _search(self, events: list[Event], room: list[int]) -> frozenset[Worker] | None:
        """Depth first, who is involved in most events first; ``room`` is how many of each stage there may be."""
        tries: list[tuple[frozenset[Worker], frozenset[Worker]]] = [(frozenset(), frozenset())]
        for _ in range(_MOST_TRIES):
            if not tries:
                return None
            inside, outside = tries.pop()
            while True:
                unexplained = [event for event in events if not inside.intersection(event)]
                if not unexplained:
                    return inside
                taken = Counter(worker.stage for worker in inside)
                options = min(
                    (
                        [one for one in event if one not in outside and taken[one.stage] < room[one.stage]]
                        for event in unexplained
                    ),
                    key=len,
                )
                if len(options) != 1:
                    break
                inside = inside.union(options)
            involved = Counter(worker for event in unexplained for worker in event)
            options.sort(key=lambda one: (-involved[one], not self.isolated[one], one))
            # Of the first option that holds, those before it are not in it.
            for number in reversed(range(len(options))):
                tries.append((inside.union([options[number]]), outside.union(options[:number])))
        return None
