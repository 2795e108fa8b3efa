"""Who is kept where columns are lost, without a conviction, because somebody there keeps columns out unproved.

Some events leave columns out and prove nothing: the ends of a link report other numbers to a baseline, of which each
has a copy; a neighbour has nothing to say; a worker is accused by its neighbours' sketches alone, and a twin step or an
audit clears it; too few workers are left in a twin step to tell which of them is wrong, or whether it is those whom it
reached. Who lies so is never convicted, and would keep columns out for ever. But of each such event one thing is known:
among the few workers *involved* in it, at least one is bad.

So the smallest explanation is looked for: workers, as few of any one stage as possible and never more than f, such that
each event remembered involves one of them or a convicted one (``explanation.py``). These are *isolated*: dealt into the
columns in which convicted workers stand, or would (``Doubts.packed``). An honest one may be among them. It costs
nothing but its place.

Why that is enough, f = (R - 1) // 2 and fewer than half of each stage bad: the bad are an explanation themselves. So
the smallest takes K columns, K no more than there are bad ones of one stage. An event in another column is of none of
those isolated, hence new, and refutes the explanation. A bad worker x that was outside of it cannot be at odds with
more than K of one stage, since each of those would be inside. So with both ends of a link involved, n bad workers in
all keep no more than n (2 f + 1) columns out beyond the K, ever, as long as all is remembered. Where three are involved
it is n (6 f R + 1). The events of twin steps involve workers of several columns.

An alarm for which nobody can be blamed is such an event too, with all of its column involved.

An event is remembered for some steps, and anew whenever somebody isolated for it is involved in another. Of more than
``_EVENTS_A_WORKER`` for each worker the oldest give way, which says nothing about whether they can be explained. Events
that cannot be explained by f a stage come of something else (a broken first stage, more bad workers); the older half of
them is forgotten then, and for as many steps none is news.

Worked example, 6 stages x 3 replicas, f = 1, columns as DeepSpeed's own. In one step (0, 0) and (1, 0), (1, 1) and
(2, 1), (2, 2) and (3, 2) report other numbers to a baseline, and no column is left. Stage 0 is trusted, so (1, 0) is
isolated; then not (1, 1), which would be two of stage 1, but (2, 1), and for the same reason (3, 2). The next step has
all three in column 0, and two columns without any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from deepspeed_sentinel.judgement.explanation import smallest_explanation
from deepspeed_sentinel.mesh import Mesh, Worker, columns_of

_LEAST_REPLICAS = 3
_LEAST_EVENTS, _EVENTS_A_WORKER = 512, 8  # remembered; the oldest of more than the larger of both give way
_DISPUTE, _ALARM = -1, -2

# Its kind, or the stage of who has to be cleared for it to be one; and who is involved, s R + r of each, in order.
_Event = tuple[int, tuple[int, ...]]


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
        self._events: dict[_Event, int] = {}  # until when each is remembered; the oldest come first
        self._most = max(_LEAST_EVENTS, _EVENTS_A_WORKER * mesh.stages * mesh.replicas)
        self._time = 0
        self._unexplained = 0  # steps for which nothing is news
        self.isolated = np.zeros((mesh.stages, mesh.replicas), bool)
        self.news = False

    def step(
        self,
        served: np.ndarray,
        involved: np.ndarray,
        between: np.ndarray,
        unblamed: np.ndarray,
        accused: Sequence[tuple[Worker, int]],
        cleared: np.ndarray,
        convicted: np.ndarray,
        changed: bool,
    ) -> None:
        """Enter one step.

        Args:
            served: int [S, C], who served each column.
            involved: bool [events, S, C], who is involved in each, by column; none where nothing is marked.
            between: bool [events, S, R], who is involved in each of a twin step.
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
        if not (len(self._events) or involved.size or between.size or unblamed.any() or accused or changed):
            return
        self._time += 1
        found = [
            (_DISPUTE, self._of_column(involved[event, :, column], served[:, column]))
            for event, column in np.argwhere(involved.any(1)).tolist()
        ]
        found += [(_DISPUTE, self._listed(workers)) for workers in between]
        everybody = np.ones(self._mesh.stages, bool)
        found += [
            (_ALARM, self._of_column(everybody, served[:, column])) for column in np.flatnonzero(unblamed).tolist()
        ]
        for worker, column in accused:
            beside = np.abs(np.arange(self._mesh.stages) - worker.stage) <= 1
            found.append((worker.stage, self._of_column(beside, served[:, column])))
        more = self._enter(found, set(self._listed(convicted)))
        more |= self._clear(cleared)
        number = len(self._events)
        self._keep(lambda event: self._events[event] > self._time)
        fewer = changed or len(self._events) < number
        if more or fewer:
            self._explain(convicted, fewer)

    def beside(self, served: np.ndarray) -> np.ndarray:
        """bool [S, R], who is isolated or serves (int [S, C]) a column next to one who is."""
        if not self.isolated.any():
            return np.zeros_like(self.isolated)
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
            self._explain(convicted, fewer=False)

    def forget(self, worker: Worker) -> None:
        """Remember no event of a worker, since it is another one than before."""
        one = worker.stage * self._mesh.replicas + worker.replica
        self._keep(lambda event: one not in event[1])
        self.isolated[worker] = False

    def state_dict(self) -> dict[str, np.ndarray]:
        members = np.zeros((len(self._events), self.isolated.size), bool)
        for row, (_, workers) in enumerate(self._events):
            members[row, list(workers)] = True
        events = [(kind, until - self._time) for (kind, _), until in self._events.items()]
        return {
            "members": members,
            "events": np.array(events, np.int64).reshape(-1, 2),
            "unexplained": np.array(self._unexplained),
            "isolated": self.isolated.copy(),
        }

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of what may be negative in a state."""
        largest = max(self._mesh.stages, self._mesh.replicas, self._memory, self._patience)
        return {"events": (float(_ALARM), float(largest)), "unexplained": (0.0, float(self._memory))}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._time, self._events = 0, {}
        for members, (kind, steps) in zip(state["members"], state["events"].tolist(), strict=False):
            if members.any() and kind < self._mesh.stages:
                self._events[kind, self._listed(members)] = steps
        self._let_go()
        self._unexplained, self.isolated = int(state["unexplained"]), np.array(state["isolated"])

    def _listed(self, workers: np.ndarray) -> tuple[int, ...]:
        """Workers (bool [S, R]) as s R + r, in order."""
        return tuple(np.flatnonzero(workers).tolist())

    def _of_column(self, stages: np.ndarray, served: np.ndarray) -> tuple[int, ...]:
        """Workers of one column, of some stages (bool [S]), as they served it (int [S])."""
        where = np.flatnonzero(stages)
        return tuple((where * self._mesh.replicas + served[where]).tolist())

    def _enter(self, found: Sequence[_Event], convicted: set[int]) -> bool:
        """Whether the events of a step, each its kind and who is involved, have to be explained anew."""
        isolated = set(self._listed(self.isolated))
        middle = range(self._mesh.replicas, self.isolated.size - self._mesh.replicas)
        more, again = False, set()
        for kind, involved in found:
            workers = tuple(one for one in involved if one in middle)
            if not workers or not convicted.isdisjoint(workers):
                continue
            if known := isolated.intersection(workers):
                again |= known
                continue
            # As the newest, if it was remembered.
            same = self._events.pop((kind, workers), None)
            self._events[kind, workers] = self._until(kind)
            self.news |= kind < 0 and same is None
            more |= kind < 0
        for kind, workers in self._events if again else ():
            if kind < 0 and not again.isdisjoint(workers):
                self._events[kind, workers] = self._until(kind)
        self._let_go()
        return more

    def _clear(self, cleared: np.ndarray) -> bool:
        """What stands for whether somebody (bool [S, R]) is cleared becomes an event."""
        those, replicas = set(self._listed(cleared)), self._mesh.replicas
        found = [
            (kind, workers)
            for kind, workers in (self._events if those else ())
            if kind >= 0 and any(one in those and one // replicas == kind for one in workers)
        ]
        for kind, workers in found:
            del self._events[kind, workers]
            self._events[_ALARM, workers] = self._until(_ALARM)
        self.news |= bool(found)
        return bool(found)

    def _until(self, kind: int) -> int:
        return self._time + (self._memory if kind == _DISPUTE else self._patience)

    def _keep(self, wanted: Callable[[_Event], bool]) -> None:
        self._events = {event: until for event, until in self._events.items() if wanted(event)}

    def _let_go(self) -> None:
        """The oldest of too many give way. They may well be explained, so what is new stays news."""
        for event in list(self._events)[: -self._most]:
            del self._events[event]

    def _explain(self, convicted: np.ndarray, fewer: bool) -> None:
        """``fewer`` events, or others convicted, may be explained by fewer of a stage."""
        gone = set(self._listed(convicted))
        self._keep(lambda event: gone.isdisjoint(event[1]))
        packed = np.count_nonzero(self.isolated | convicted, axis=1)
        self.isolated = self.isolated & ~convicted
        found = None
        while found is None:
            events = [event for event in self._events if event[0] < 0]
            involved = [workers for _, workers in events]
            found = smallest_explanation(involved, convicted, self.isolated, 0 if fewer else int(packed.max()))
            if found is None:
                for event in events[: (len(events) + 1) // 2]:
                    del self._events[event]
                self._unexplained = self._memory
        self.isolated = found
        self.news &= not self._unexplained


def involved(by_ends: np.ndarray, silent: np.ndarray) -> np.ndarray:
    """Who is involved in disputes that prove nothing.

    Args:
        by_ends: bool [L, C], links whose ends differ.
        silent: bool [S - 2, C], middle stages of which a neighbour has nothing to say.

    Returns:
        bool [events, S, C]: both ends of such a link, and such a stage with its neighbours.
    """
    links, columns = by_ends.shape
    if not (by_ends.any() or silent.any()):
        return np.zeros((0, links + 1, columns), bool)
    workers = np.zeros((links + len(silent), links + 1, columns), bool)
    for link in range(links):
        workers[link, link : link + 2] = by_ends[link]
    for before in range(len(silent)):
        workers[links + before, before : before + 3] = silent[before]
    return workers
