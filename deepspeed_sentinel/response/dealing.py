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
* Whoever can stay where it is does: with the same doubts, in the same turn, a second deal moves nobody.

Worked example, 5 stages x 4 replicas, (1, 0) and (2, 1) convicted, (3, 2) suspected; K = 1, f = 1, T = 1. Before and
after, by column, ! convicted, ? suspected:

    0    1    2    3          0    1    2    3
    0!   1    2    3          0!   1    2    3
    0    1!   2    3          1!   0    2    3      column 0 is lost: (2, 1) changes places with (2, 0)
    0    1    2?   3          0    1    2?   3      column 2 is where (3, 2) is tried: it stays
    0    1    2    3          0    1    2    3
"""

from __future__ import annotations

from itertools import chain
from typing import Literal

import numpy as np

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.mesh import Mesh, Worker, check_wiring, columns_of, identity
from deepspeed_sentinel.response.assignment import cheapest
from deepspeed_sentinel.response.waiting import NO_SUSPECT, QUEUED, TRIED, kinds_of, waiting

_TURN = 8  # steps for which a suspect waits for others of its stage
_DRAW = 4  # what else is drawn from the same seed
# What it costs to try a suspect where others are tried, and to have it elsewhere than where suspects are tried.
_CROWDED, _WITH_LOST, _ELSEWHERE = 1, 2, 3


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
    """One deal: stage after stage as well as it can be, given the others, until none gets any better.

    How good a wiring is hangs on the doubts alone, not on the wiring before. So each change is for the better, they
    come to an end, and dealing once more changes nothing. Of all that are as good a stage takes one in which fewest
    move. What counts, each before all that follow:

    * nobody who is convicted, isolated or waits because of another of its stage stands outside of the lost columns,
    * no suspect stands in the column that is to be left without any,
    * no two at odds stand in one column,
    * suspects stand where they are to be tried or to wait (``_places_of_suspects``).

    Attributes:
        wiring: int64 [S, C], the new one.
    """

    def __init__(self, mesh: Mesh, before: np.ndarray, doubts: Doubts, turn: int) -> None:
        self._before, self._stood = before, columns_of(before)
        self._mesh, self._doubts = mesh, doubts
        convicted = doubts.packed if doubts.isolated is None else doubts.packed & ~doubts.isolated
        # Where most of them stand already, and of equals the first.
        packed, alone = (np.take_along_axis(of, before, 1).sum(0) for of in (doubts.packed, convicted))
        lost = int(np.count_nonzero(doubts.packed, axis=1).max())
        of_convicted = _largest(alone, int(np.count_nonzero(convicted, axis=1).max()))
        self._lost = _largest(np.where(of_convicted, mesh.stages, packed), lost)
        left = mesh.replicas - lost  # the last of these is to be without suspects
        self._places = max(0, min(max(1, left - (mesh.replicas - 1) // 2 - 1), left - 1))

        odds = _both_ways(doubts.apart)
        within = odds[:, 0] == odds[:, 2]
        waits = waiting(doubts, odds[within], lost)
        self._home = np.where(convicted, 2, doubts.packed | waits)
        self._may_stand = np.stack([np.ones_like(self._lost), self._lost, of_convicted])
        beside = lost - np.count_nonzero(self._home, axis=1)
        self._kind = kinds_of(doubts.suspects & ~waits, self._places, beside, turn)
        # Suspects that are tried now, and all of them, int64 [2, S, R].
        self._counted = np.stack([self._kind == TRIED, self._kind != NO_SUSPECT]).astype(np.int64)
        # Two that are packed both may stand in one column: it is lost anyway.
        odds = odds[~within & ~(doubts.packed[odds[:, 0], odds[:, 1]] & doubts.packed[odds[:, 2], odds[:, 3]])]
        self._odds = odds[np.argsort(odds[:, 0], kind="stable")]
        self._from = np.searchsorted(self._odds[:, 0], np.arange(mesh.stages + 1))
        self._at_odds = self._from[1:] > self._from[:-1]
        self._marked = doubts.packed | doubts.suspects | waits
        self._marked[odds[:, 0], odds[:, 1]] = True

        self.wiring, self._columns = before.copy(), self._stood.copy()
        self._in = np.take_along_axis(self._counted, before[None], 2).sum(1)  # these two by column, int64 [2, C]
        # From behind, so that who is the first to be tried in a column stays there, and others make room.
        stages = [stage for stage in range(mesh.stages - 2, 0, -1) if self._marked[stage].any()]
        # What others do matters to suspects and to those at odds alone.
        reacts = (self._kind != NO_SUSPECT).any(1) | self._at_odds
        for stage in stages:
            if not reacts[stage]:
                self._pack(stage)
        stages = [stage for stage in stages if reacts[stage]]
        better = True
        while better:
            self._choose()
            better = any([self._deal(stage) for stage in stages])  # noqa: C419, each of them has its turn
        self._bring_out()

    def _choose(self) -> None:
        """Columns to try suspects in, and one for none of them: for this wiring the best choice."""
        tried, suspects = self._in
        gain = _ELSEWHERE * tried - _CROWDED * np.maximum(tried - 1, 0)
        # Of equals the one that most may not stand in anyway, and then the last.
        barred = self._conflicts(0, len(self._before)).sum(0)
        order = np.lexsort((-np.arange(len(gain)), -barred, gain, suspects, self._lost))
        self._without = np.zeros_like(self._lost)
        self._without[order[0]] = not self._lost[order[0]]
        self._to_try = _largest(np.where(self._lost | self._without, -1, gain), self._places)

    def _pack(self, stage: int) -> None:
        """A stage in which nobody is suspected or at odds: who may not stand where it does moves, as few as can be."""
        home, columns = self._home[stage], self._columns[stage].copy()
        holders, moves = self.wiring[stage], np.zeros(len(home), bool)
        free = np.ones(len(home), bool)
        for level in (2, 1):
            moves |= (home == level) & ~self._may_stand[level, columns]
            movers = np.flatnonzero(moves & (home == level))
            # Rather where somebody leaves, or who may stand anywhere makes room.
            stays = np.where(moves[holders], -1, home[holders])
            into = np.flatnonzero(self._may_stand[level] & free & (stays < level))
            into = into[np.argsort(stays[into], kind="stable")][: len(movers)]
            columns[movers], free[into] = into, False
            moves[holders[into]] |= home[holders[into]] > 0
        if moves.any():
            marked = np.flatnonzero(home)
            self.wiring[stage] = self._filled(stage, marked, columns[marked])
            self._columns[stage] = np.argsort(self.wiring[stage])

    def _filled(self, stage: int, marked: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """A row in which these serve these columns, and of the others stays who can."""
        rest = np.flatnonzero(~np.isin(np.arange(self._mesh.replicas), marked))
        row = np.full(self._mesh.replicas, -1)
        row[columns] = marked
        stays = row[self._stood[stage, rest]] < 0
        row[self._stood[stage, rest[stays]]] = rest[stays]
        row[row < 0] = rest[~stays]
        return row

    def _deal(self, stage: int) -> bool:
        """One stage, given the others. True where it became better."""
        before = self._before[stage]
        marked = np.flatnonzero(self._marked[stage])
        kind, stood = self._kind[stage, marked], self._stood[stage, marked]
        tried_in, suspects_in = self._in - self._counted[:, stage, self.wiring[stage]]
        everybody = np.arange(len(marked))
        cost = np.empty((len(marked), len(before)), np.int64)
        cost[:] = 2 - self._marked[stage, before]  # who moves, and who has to make room
        cost[everybody, stood] = 0
        # The digits of one number: each counts more than all before it can come to. They fit up to 3,000 replicas. At
        # odds are workers of two stages on either side, so no more than four in a column.
        digit = moves = 2 * len(before) + 1
        for what, most in (
            (self._places_of_suspects(tried_in > 0)[kind], _ELSEWHERE),
            (self._conflicts(stage, stage + 1)[marked], 4),
            (self._without & (kind != NO_SUSPECT)[:, None], 1),
            (~self._may_stand[self._home[stage, marked]], 1),
        ):
            cost += digit * what
            digit *= most * len(before) + 1
        if (cost[everybody, self._columns[stage, marked]] // moves == cost.min(1) // moves).all():
            return False  # none of them could stand any better
        # Ties go to the first, so to the column of fewest suspects.
        order = np.argsort(suspects_in, kind="stable")
        columns = order[cheapest(cost[:, order], np.argsort(order)[stood])]
        if _sum(cost, columns) == _sum(cost, self._columns[stage, marked]):
            return False  # as good, and other ties would move them for ever
        row = self._filled(stage, marked, columns)
        self._in[:] = tried_in, suspects_in
        self._in += self._counted[:, stage, row]
        self.wiring[stage], self._columns[stage] = row, np.argsort(row)
        return True

    def _places_of_suspects(self, crowded: np.ndarray) -> np.ndarray:
        """What it costs to have one of each kind in each column, int64 [4, C]. Crowded: others are tried there."""
        cost = np.zeros((4, len(crowded)), np.int64)
        cost[TRIED] = np.where(self._to_try, _CROWDED * crowded, np.where(self._lost, _WITH_LOST, _ELSEWHERE))
        cost[QUEUED] = np.where(self._lost, 0, _ELSEWHERE)
        return cost

    def _conflicts(self, stage: int, end: int) -> np.ndarray:
        """How many that the workers of some stages are to be kept apart from serve each column, int64 [R, C]."""
        _, replica, other_stage, other = self._odds[self._from[stage] : self._from[end]].T
        conflicts = np.zeros((self._mesh.replicas, self._mesh.replicas), np.int64)
        np.add.at(conflicts, (replica, self._columns[other_stage, other]), 1)
        return conflicts

    def _bring_out(self) -> None:
        """Who was not compared changes places with somebody who may stand anywhere, so nothing gets any worse."""
        known = self._marked | self._doubts.untried
        for stage, replica in np.argwhere(self._doubts.untried & ~self._marked).tolist():
            row = self.wiring[stage]
            free = np.flatnonzero(self._to_try & ~known[stage, row])
            column = int(np.flatnonzero(row == replica)[0])
            if self._lost[column] and free.size:
                into = free[np.argmin(self._in[1, free])]
                row[column], row[into] = row[into], replica


def _sum(cost: np.ndarray, columns: np.ndarray) -> int:
    return int(cost[np.arange(len(cost)), columns].sum())


def _both_ways(apart: tuple[tuple[Worker, Worker], ...]) -> np.ndarray:
    """Each two in both orders, int64 [2n, 4]: stage, replica, stage, replica."""
    odds = np.fromiter(chain.from_iterable(chain.from_iterable(apart)), np.int64, 4 * len(apart)).reshape(-1, 4)
    return np.concatenate([odds, odds[:, [2, 3, 0, 1]]])


def _largest(counts: np.ndarray, number: int) -> np.ndarray:
    """Which are the largest, bool; of equals the first."""
    chosen = np.zeros(len(counts), bool)
    chosen[np.argsort(-counts, kind="stable")[:number]] = True
    return chosen
