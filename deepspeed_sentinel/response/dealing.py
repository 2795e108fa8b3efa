"""Which replica of each stage serves which column in the next step.

Replicas of a stage hold the same weights, so who serves a column changes nothing of what is computed, only who is to
be trusted with it. ``docs/wiring.md`` has the rules and what they cost. With ``"heal"``, from a new draw with
``"shuffle"``, and f = (R - 1) // 2 bad workers a stage at most:

* Nothing moves, not even back, as long as nobody is convicted, isolated, suspected or at odds with another.
* Convicted and isolated workers are packed into K columns, K the largest number of them in any stage: fewer cannot
  hold them. Of these the convicted stand in as few as can hold them alone, since such a column does not count with
  ``"quarantine"``, and one of isolated workers does.
* Suspects are spread over T = R - K - (f + 1) other columns (at least one, and such that one without any is left), each
  into one of its own as far as there are so many. A twin step proves the first in each column, while f + 1 columns
  agree. Of one stage no more than T can be tried at once: the others wait where convicted workers stand, taking turns.
* Who was not compared when somebody was convicted, because it stood behind, leaves the lost columns to be tried too.
* Two workers at odds get other partners. Of two of one stage that a twin step found to differ, one waits where
  convicted workers stand, so that the other is compared with somebody else: rather the one that is not accused, and
  of equals the one that is isolated.
* Whoever can stay where it is does.

Worked example, 5 stages x 4 replicas, (1, 0) and (2, 1) convicted, (3, 2) suspected; K = 1, f = 1, T = 1. Before and
after, by column, ! convicted, ? suspected:

    0    1    2    3          0    1    2    3
    0!   1    2    3          0!   1    2    3
    0    1!   2    3          1!   0    2    3      column 0 is lost: (2, 1) changes places with (2, 0)
    0    1    2?   3          0    1    2?   3      column 2 is where (3, 2) is tried: it stays
    0    1    2    3          0    1    2    3
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.mesh import Mesh, Worker, check_wiring, columns_of, identity

_TURN = 8  # steps for which a suspect waits for others of its stage
_DRAW = 4  # what else is drawn from the same seed


class Dealer:
    """Deals columns step by step, the same on all ranks: it draws on nothing but what all of them agree on.

    Args:
        mesh: stages and replicas.
        wiring: how; see the config block.
        shuffle_every: steps from one draw to the next, with "shuffle".
        seed: of these draws.
        acts: False where doubts about a worker change nothing.

    Attributes:
        wiring: int64 [S, C], of the step that comes or runs.
    """

    def __init__(
        self,
        mesh: Mesh,
        wiring: Literal["heal", "static", "shuffle"] = "heal",
        shuffle_every: int = 1,
        seed: int = 0,
        acts: bool = True,
    ) -> None:
        self._mesh = mesh
        self._way = wiring
        self._every = shuffle_every
        self._seed = seed
        self._heals = acts and wiring != "static"
        self.wiring = identity(mesh)

    @classmethod
    def of(cls, config: SentinelConfig, mesh: Mesh) -> Dealer:
        """As configured. Who only observes heals nothing."""
        return cls(mesh, config.wiring, config.shuffle_every, config.seed or 0, config.action != "observe")

    def next(self, step: int, doubts: Doubts) -> np.ndarray:
        """The wiring of the step after this one, int64 [S, C].

        Args:
            step: the engine's global step.
            doubts: about whom, after it.
        """
        if self._way == "shuffle" and (step + 1) % self._every == 0:
            self.wiring = _drawn(self._mesh, self._seed, step + 1)
        if self._heals and _about_anybody(doubts):
            self.wiring = _Healing(self._mesh, self.wiring, doubts, step // _TURN).wiring
        return self.wiring

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"wiring": self.wiring.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Go on from another wiring.

        Raises:
            ValueError: it is none of this mesh.
        """
        wiring = np.asarray(state["wiring"])
        check_wiring(self._mesh, wiring)
        self.wiring = wiring.astype(np.int64)


def _about_anybody(doubts: Doubts) -> bool:
    marked = doubts.packed | doubts.suspects | doubts.untried
    return bool(marked.any() or doubts.apart)


def _drawn(mesh: Mesh, seed: int, step: int) -> np.ndarray:
    generator = np.random.default_rng((seed, step, _DRAW))
    wiring = identity(mesh)
    for stage in range(1, mesh.stages - 1):
        wiring[stage] = generator.permutation(mesh.replicas)
    return wiring


class _Healing:
    """One deal, row by row in the order of the stages.

    Attributes:
        wiring: int64 [S, C], the new one.
    """

    def __init__(self, mesh: Mesh, before: np.ndarray, doubts: Doubts, turn: int) -> None:
        self._mesh, self._doubts, self._turn = mesh, doubts, turn
        self._before, self._stood = before, columns_of(before)
        self._apart: dict[Worker, list[Worker]] = {}
        for one, other in doubts.apart:
            self._apart.setdefault(one, []).append(other)
            self._apart.setdefault(other, []).append(one)
        self._at_odds: list[list[Worker]] = [[] for _ in range(mesh.stages)]
        for worker in sorted(self._apart):
            self._at_odds[worker.stage].append(worker)
        replicas = mesh.replicas
        lost = int(np.count_nonzero(doubts.packed, axis=1).max())
        tried = min(max(1, replicas - lost - (replicas - 1) // 2 - 1), replicas - 1 - lost)
        self._convicted = doubts.packed if doubts.isolated is None else doubts.packed & ~doubts.isolated
        packed, suspects, convicted = (
            np.take_along_axis(which, before, 1) for which in (doubts.packed, doubts.suspects, self._convicted)
        )
        # Where most of them stand already, and of equals the first.
        needed = int(np.count_nonzero(self._convicted, axis=1).max())
        self._of_convicted = _largest(np.count_nonzero(convicted, axis=0), needed)
        self._lost = _largest(np.where(self._of_convicted, len(packed), np.count_nonzero(packed, axis=0)), lost)
        self._tried = _largest(np.where(self._lost, -1, np.count_nonzero(suspects, axis=0)), max(tried, 0))
        # Who is the first to be tried there stays, and others make room: the stage of that suspect, by column.
        self._first = np.where(self._tried & suspects.any(0), np.argmax(suspects, axis=0), -1)
        self._suspects_in = np.zeros(replicas, np.int64)
        self.wiring = before.copy()
        concerned = (doubts.packed | doubts.suspects | doubts.untried).any(1)
        for stage in range(1, mesh.stages - 1):
            if concerned[stage] or self._at_odds[stage]:
                self.wiring[stage] = self._row(stage)

    def _row(self, stage: int) -> np.ndarray:
        """int64 [C], who of a stage serves which column."""
        row = np.full(self._mesh.replicas, -1)
        # Suspects leave the lost columns anyway, so those packed take their places there first.
        leaving = self._doubts.suspects[stage, self._before[stage]]
        convicted = self._convicted[stage]
        self._put_aside(row, stage, np.flatnonzero(convicted), self._of_convicted, leaving)
        self._put_aside(row, stage, np.flatnonzero(self._doubts.packed[stage] & ~convicted), self._lost, leaving)
        aside = self._waiting(stage, int(np.count_nonzero(self._lost & (row < 0)))) if self._at_odds[stage] else []
        self._put_aside(row, stage, np.array(aside, np.int64), self._lost, leaving)
        for replica in self._in_turn(stage, aside):
            column = self._column_of_suspect(row, Worker(stage, replica))
            row[column] = replica
            self._suspects_in[column] += 1
        for replica in np.flatnonzero(self._doubts.untried[stage] & self._lost[self._stood[stage]]).tolist():
            if replica not in row and (free := self._free_to_try(row, stage)).size:
                row[free[np.argmin(self._suspects_in[free])]] = replica
        for worker in (worker for worker in self._at_odds[stage] if worker.replica not in row):
            row[_cheapest(row, self._conflicts(worker), self._moves(worker), self._lost)] = worker.replica
        waits = np.ones(len(row) + 1, bool)
        waits[row] = False  # a free column is -1, and marks the one behind the last
        rest = np.flatnonzero(waits[:-1])
        stays = row[self._stood[stage, rest]] < 0
        row[self._stood[stage, rest[stays]]] = rest[stays]
        row[row < 0] = rest[~stays]
        return row

    def _put_aside(
        self, row: np.ndarray, stage: int, replicas: np.ndarray, lost: np.ndarray, first: np.ndarray
    ) -> None:
        """Into lost columns. Who stands in one stays, the others take free ones, these (bool [C]) first."""
        stood = self._stood[stage, replicas]
        stays = lost[stood] & (row[stood] < 0)
        row[stood[stays]] = replicas[stays]
        if not stays.all():
            free = lost & (row < 0)
            columns = np.concatenate([np.flatnonzero(free & first), np.flatnonzero(free & ~first)])
            row[columns[: np.count_nonzero(~stays)]] = replicas[~stays]

    def _waiting(self, stage: int, places: int) -> list[int]:
        """Of each two of a stage that differed one, as far as there are places: who differed from most first."""
        accused, suspected = self._doubts.accused[stage], (self._doubts.suspects | self._doubts.untried)[stage]
        packed, lost = self._doubts.packed[stage], self._lost[self._stood[stage]]
        isolated = np.zeros_like(packed) if self._doubts.isolated is None else self._doubts.isolated[stage]
        # Who is packed waits already.
        pairs = [
            (one.replica, other.replica)
            for one in self._at_odds[stage]
            for other in self._apart[one]
            if other.stage == stage and one < other and not (packed[one.replica] or packed[other.replica])
            if suspected[one.replica] or suspected[other.replica]
        ]
        waiting: list[int] = []
        while pairs and len(waiting) < places:

            def worth(replica: int) -> tuple[int, int, bool, bool, bool, bool, int]:
                mine = [pair for pair in pairs if replica in pair]  # noqa: B023
                # Rather not the only suspect of the two: it is the one to be tried.
                better = [pair for pair in mine if not suspected[replica] or suspected[list(pair)].all()]
                return (
                    len(better),
                    len(mine),
                    not accused[replica],
                    not suspected[replica],
                    # What is unproved is of this one, unless the others alone show it too.
                    bool(isolated[replica]),
                    bool(lost[replica]),
                    replica,
                )

            waiting.append(max({replica for pair in pairs for replica in pair}, key=worth))
            pairs = [pair for pair in pairs if waiting[-1] not in pair]
        return waiting

    def _in_turn(self, stage: int, waiting: list[int]) -> list[int]:
        """The suspects of a stage, in the order in which they choose a column."""
        suspects = [one for one in np.flatnonzero(self._doubts.suspects[stage]).tolist() if one not in waiting]
        places = int(np.count_nonzero(self._tried))
        if len(suspects) > places:
            turn = self._turn * places % len(suspects)
            suspects = suspects[turn:] + suspects[:turn]
        return sorted(suspects[:places], key=lambda one: not self._tried[self._stood[stage, one]]) + suspects[places:]

    def _column_of_suspect(self, row: np.ndarray, worker: Worker) -> int:
        own = int(self._stood[worker])
        others = self._suspects_in + (self._first >= worker.stage)
        others[own] -= self._first[own] == worker.stage
        crowded = others > 0
        at_rest = not crowded[own] or crowded[self._tried].all()
        if worker not in self._apart and row[own] < 0 and self._tried[own] and at_rest:
            return own
        clean = ~(self._lost | (self._suspects_in > 0) | (self._first >= 0))
        last_clean = clean & (np.count_nonzero(clean) == 1)
        where = np.where(self._tried, 0, np.where(self._lost, 1, 2))
        return _cheapest(row, last_clean, self._conflicts(worker), where, crowded, self._moves(worker), others)

    def _free_to_try(self, row: np.ndarray, stage: int) -> np.ndarray:
        """Columns in which somebody may be tried, and of this stage nobody is, int [n]."""
        return np.flatnonzero(self._tried & (row < 0) & ~self._doubts.untried[stage, self._before[stage]])

    def _conflicts(self, worker: Worker) -> np.ndarray:
        """How many of those that a worker is to be kept apart from serve each column, as far as that is decided."""
        conflicts = np.zeros(self._mesh.replicas, np.int64)
        for other in self._apart.get(worker, ()):
            if other.stage < worker.stage or self._mesh.is_trusted(other.stage):
                conflicts[self.wiring[other.stage] == other.replica] += 1
        return conflicts

    def _moves(self, worker: Worker) -> np.ndarray:
        return np.arange(self._mesh.replicas) != self._stood[worker]


def _largest(counts: np.ndarray, number: int) -> np.ndarray:
    """Which are the largest, bool; of equals the first."""
    chosen = np.zeros(len(counts), bool)
    chosen[np.argsort(-counts, kind="stable")[:number]] = True
    return chosen


def _cheapest(row: np.ndarray, *costs: np.ndarray) -> int:
    """The free column (-1 in ``row``) of the least first cost, among equals of the least second one, and so on."""
    order = np.lexsort(costs[::-1])
    return int(order[row[order] < 0][0])
