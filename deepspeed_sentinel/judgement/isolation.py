"""Who is kept where columns are lost, without a conviction, because somebody there keeps columns out unproved.

Some events leave columns out and prove nothing: the ends of a link report other numbers to a baseline, of which each
has a copy; a neighbour has nothing to say; a worker is accused by its neighbours' sketches alone, and a twin step or an
audit clears it; too few workers are left in a twin step to tell which of them is wrong, or whether it is those whom it
reached. Who lies so is never convicted, and would keep columns out for ever. But of each such event one thing is known:
among the few workers *involved* in it, at least one is bad.

So the smallest explanation is looked for: workers, as few of any one stage as possible and never more than f, such that
each event remembered involves one of them or a convicted one. These are *isolated*: dealt into the columns in which
convicted workers stand, or would (``Doubts.packed``). An honest one may be among them. It costs nothing but its place.

Why that is enough, f = (R - 1) // 2 and fewer than half of each stage bad: the bad are an explanation themselves. So
the smallest takes K columns, K no more than there are bad ones of one stage. An event in another column is of none of
those isolated, hence new, and refutes the explanation. A bad worker x that was outside of it cannot be at odds with
more than K of one stage, since each of those would be inside. So with both ends of a link involved, n bad workers in
all keep no more than n (2 f + 1) columns out beyond the K, ever, as long as all is remembered. Where three are involved
it is n (6 f R + 1). The events of twin steps involve workers of several columns.

An alarm for which nobody can be blamed is such an event too, with all of its column involved.

An event is remembered for some steps, and anew whenever somebody isolated for it is involved in another. Events that
cannot be explained by f a stage come of something else (a broken first stage, more bad workers); the older half of
them is forgotten then, and for as many steps none is news.

Worked example, 6 stages x 3 replicas, f = 1, columns as DeepSpeed's own. In one step (0, 0) and (1, 0), (1, 1) and
(2, 1), (2, 2) and (3, 2) report other numbers to a baseline, and no column is left. Stage 0 is trusted, so (1, 0) is
isolated; then not (1, 1), which would be two of stage 1, but (2, 1), and for the same reason (3, 2). The next step has
all three in column 0, and two columns without any.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepspeed_sentinel.mesh import Mesh, Worker, columns_of

_LEAST_REPLICAS = 3
_MOST_EVENTS = 512  # remembered; the oldest give way
_MOST_TRIES = 500  # of one search; beyond, one more of a stage is allowed, and at last what explains most is taken
_DISPUTE, _ALARM = -1, -2


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
        # A row an event: who is involved, bool [N, S R]; its kind, or the stage of who has to be cleared for it to be
        # one, and steps to remember it, int [N, 2].
        self._members = np.zeros((0, mesh.stages * mesh.replicas), bool)
        self._events = np.zeros((0, 2), np.int64)
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
        more, fewer = False, changed
        self._events[:, 1] -= 1
        for event, column in np.argwhere(involved.any(1)).tolist():
            more |= self._enter(self._of_column(involved[event, :, column], served[:, column]), _DISPUTE, convicted)
        for workers in between:
            more |= self._enter(workers, _DISPUTE, convicted)
        everybody = np.ones(self._mesh.stages, bool)
        for column in np.flatnonzero(unblamed).tolist():
            more |= self._enter(self._of_column(everybody, served[:, column]), _ALARM, convicted)
        for worker, column in accused:
            beside = np.abs(np.arange(self._mesh.stages) - worker.stage) <= 1
            self._enter(self._of_column(beside, served[:, column]), worker.stage, convicted)
        more |= self._clear(cleared)
        kept = self._events[:, 1] > 0
        self._keep(kept)
        fewer |= not bool(kept.all())
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
        self._keep(~self._members[:, worker.stage * self._mesh.replicas + worker.replica])
        self.isolated[worker] = False

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "members": self._members.copy(),
            "events": self._events.copy(),
            "unexplained": np.array(self._unexplained),
            "isolated": self.isolated.copy(),
        }

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of what may be negative in a state."""
        largest = max(self._mesh.stages, self._mesh.replicas, self._memory, self._patience)
        return {"events": (float(_ALARM), float(largest)), "unexplained": (0.0, float(self._memory))}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        number = min(len(state["members"]), len(state["events"]))
        self._members, self._events = np.array(state["members"])[:number], np.array(state["events"])[:number]
        self._keep(self._members.any(1) & (self._events[:, 0] < self._mesh.stages))
        self._unexplained, self.isolated = int(state["unexplained"]), np.array(state["isolated"])

    def _of_column(self, stages: np.ndarray, served: np.ndarray) -> np.ndarray:
        """bool [S, R], workers of one column, of some stages (bool [S]), as they served it (int [S])."""
        workers = np.zeros_like(self.isolated)
        workers[stages, served[stages]] = True
        return workers

    def _enter(self, workers: np.ndarray, kind: int, convicted: np.ndarray) -> bool:
        """Whether an event of workers (bool [S, R]) has to be explained anew."""
        workers = workers.copy()
        workers[[0, -1]] = False
        if not workers.any() or (workers & convicted).any():
            return False
        known = workers & self.isolated
        if known.any():
            again = (self._members & known.ravel()).any(1)
            for of_kind in (_DISPUTE, _ALARM):
                self._events[again & (self._events[:, 0] == of_kind), 1] = self._steps(of_kind)
            return False
        members = workers.reshape(1, -1)
        same = (self._events[:, 0] == kind) & (self._members == members).all(1)
        self._keep(~same)
        self._members = np.concatenate([self._members, members])
        self._events = np.concatenate([self._events, np.array([[kind, self._steps(kind)]])])
        if len(self._events) > _MOST_EVENTS:
            self._forget(np.arange(1))
        self.news |= kind < 0 and not same.any()
        return kind < 0

    def _clear(self, cleared: np.ndarray) -> bool:
        """What stands for whether somebody (bool [S, R]) is cleared becomes an event."""
        stages = self._events[:, 0]
        found = np.flatnonzero(stages >= 0)
        of_stage = np.arange(self._mesh.stages)[:, None] == stages[found, None, None]
        found = found[(self._members[found].reshape(-1, *cleared.shape) & of_stage & cleared).any((1, 2))]
        self._events[found] = _ALARM, self._steps(_ALARM)
        self.news |= bool(found.size)
        return bool(found.size)

    def _steps(self, kind: int) -> int:
        return self._memory if kind == _DISPUTE else self._patience

    def _forget(self, rows: np.ndarray) -> None:
        """Some events could not all be true, or are too many."""
        kept = np.ones(len(self._events), bool)
        kept[rows] = False
        self._keep(kept)
        self._unexplained = self._memory

    def _keep(self, rows: np.ndarray) -> None:
        self._members, self._events = self._members[rows], self._events[rows]

    def _explain(self, convicted: np.ndarray, fewer: bool) -> None:
        """``fewer`` events, or others convicted, may be explained by fewer of a stage."""
        self._keep(~(self._members & convicted.ravel()).any(1))
        packed = np.count_nonzero(self.isolated | convicted, axis=1)
        found = None
        while found is None:
            rows = np.flatnonzero(self._events[:, 0] < 0)
            found = self._smallest(self._listed(rows), convicted, 0 if fewer else int(packed.max()))
            if found is None:
                self._forget(rows[: (len(rows) + 1) // 2])
        self.isolated = found
        self.news &= not self._unexplained

    def _listed(self, rows: np.ndarray) -> np.ndarray:
        """int [N, most involved in one], of events the workers involved as s R + r, and S R where there are fewer."""
        members = self._members[rows]
        number = np.count_nonzero(members, axis=1)
        event, worker = np.nonzero(members)
        result = np.full((len(rows), int(number.max(initial=0))), members.shape[1])
        result[event, (np.cumsum(members, axis=1) - 1)[event, worker]] = worker
        return result

    def _smallest(self, events: np.ndarray, convicted: np.ndarray, least: int) -> np.ndarray | None:
        """bool [S, R], of which each event has one, with those convicted as few of a stage as possible, or None."""
        number = np.count_nonzero(convicted, axis=1)
        least, most = max(int(number.max()), least, bool(len(events))), (self._mesh.replicas - 1) // 2
        found = None
        for allowed in range(least, max(least, most) + 1):
            found, left = self._search(events, allowed - number)
            if not left:
                break
        return found

    def _search(self, events: np.ndarray, room: np.ndarray) -> tuple[np.ndarray | None, int]:
        """Depth first, who is involved in most events first; ``room``, int [S], is how many of each there may be.

        Returns:
            who explains most, or None if nobody can explain all, and how many events it leaves.
        """
        nobody = self.isolated.size
        known = self.isolated.ravel()
        # Who is in it, and who is not. The last place is for who is missing in an event.
        tries = [(np.zeros(nobody + 1, bool), np.arange(nobody + 1) == nobody)]
        best, left = None, len(events) + 1
        for _ in range(_MOST_TRIES):
            if not tries:
                return None, left
            inside, outside = tries.pop()
            unexplained = events[~inside[events].any(1)]
            if len(unexplained) < left:
                best, left = inside[:-1].reshape(self.isolated.shape), len(unexplained)
            if not left:
                break
            full = np.count_nonzero(inside[:-1].reshape(self.isolated.shape), axis=1) >= room
            barred = outside.copy()
            barred[:-1] |= np.broadcast_to(full[:, None], self.isolated.shape).ravel()
            free = ~barred[unexplained]
            hardest = int(np.argmin(np.count_nonzero(free, axis=1)))
            involved = [
                (-int(np.count_nonzero(unexplained == one)), not known[one], one)
                for one in unexplained[hardest][free[hardest]].tolist()
            ]
            options = [one for _, _, one in sorted(involved)]
            # Of the first option that holds, those before it are not in it.
            for number in reversed(range(len(options))):
                more, less = inside.copy(), outside.copy()
                more[options[number]] = less[options[:number]] = True
                tries.append((more, less))
        return best, left


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
