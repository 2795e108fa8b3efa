"""A step's messages measured: how far out each lies, by fences and by what has added up, and what is learnt of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.evidence import exact
from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import Rows
from deepspeed_sentinel.judgement.blame import followers
from deepspeed_sentinel.judgement.cascade import hold_against_fences
from deepspeed_sentinel.judgement.clean import sent_by
from deepspeed_sentinel.judgement.content import Content
from deepspeed_sentinel.judgement.cusum import LEAST_REPLICAS, Cusum
from deepspeed_sentinel.judgement.fences import Fences
from deepspeed_sentinel.judgement.heard import Heard
from deepspeed_sentinel.judgement.held import Held
from deepspeed_sentinel.judgement.settings import JudgeSettings
from deepspeed_sentinel.judgement.standing import Standing
from deepspeed_sentinel.mesh import BACKWARD, Mesh, columns_of


@dataclass(frozen=True)
class Measured:
    """How far out the messages of one step lie.

    Attributes:
        held: scores by statistic, for whoever wants them.
        residuals: float64 [K, 2, L, C, M].
        scores: float64 [2, L, C, M], the largest of fences and sums; 1 on the fence.
        firm: bool [2, L, C, M], alarms that need no fence.
        turned: bool [K, 2, L], statistics in which training has turned.
        added: float64 [statistics of pairs, 2, L, C], scores of what has added up; None in a step that adds nothing.
        counted: bool [2, L, C, M], messages that were added.
        within: bool [K, 2, L, C], who may set what is usual: what adds up there is little.
        unlike: bool [C], columns whose content is unlike the others'.
    """

    held: Held
    residuals: np.ndarray
    scores: np.ndarray
    firm: np.ndarray
    turned: np.ndarray
    added: np.ndarray | None
    counted: np.ndarray
    within: np.ndarray
    unlike: np.ndarray

    @property
    def alarms(self) -> np.ndarray:
        """bool [2, L, C, M]."""
        return np.asarray((self.scores > 1.0) | self.firm)

    def alone_unlike(self, column: int) -> bool:
        """Whether a column's content is unlike that of the others, most of which are alike."""
        return bool(self.unlike[column]) and 2 * int(exact.count(self.unlike)) <= len(self.unlike)

    @property
    def sums(self) -> np.ndarray | None:
        """Of each message that was added the scores of what has, float64 [statistics of pairs, 2, L, C, M]."""
        return None if self.added is None else np.where(self.counted, self.added[..., None], 0.0)


class Measuring:
    """Measures steps, and learns from what was clean.

    Args:
        mesh: the mesh judged.
        settings: how to judge.
        table: the rows judged.

    Attributes:
        fences, cusum, content, standing: what is known, of messages, workers, columns and of who stands out.
    """

    def __init__(self, mesh: Mesh, settings: JudgeSettings, table: Rows) -> None:
        self.fences = Fences(
            mesh,
            settings.fence_window,
            settings.fence_multiplier,
            settings.target_false_positive_rate,
            settings.seed,
            table,
        )
        self.cusum = Cusum(mesh, settings.seed, table)
        self.content = Content(mesh.replicas, table)
        self.standing = Standing((len(table), 2, mesh.links, mesh.replicas), settings.strike_window)
        self._mesh = mesh
        self._table = table
        self._shuffles = settings.wiring == "shuffle"
        pairs = np.flatnonzero(table.of_pair)
        # of one part they stand in a row, and need not be copied
        self._pair_rows = slice(pairs[0], pairs[-1] + 1) if table.parts == 1 else pairs

    def step(
        self,
        heard: Heard,
        evidence: Evidence,
        served_before: np.ndarray,
        convicted: np.ndarray,
        warming_up: bool,
    ) -> Measured:
        """Measure one step.

        Args:
            heard: its messages.
            evidence: of it.
            served_before: int [S, C], who served each column in the last step.
            convicted: bool [S, R].
            warming_up: nothing is an alarm by a fence yet.
        """
        twins = evidence.twins is not None
        whole = sound = heard.whole
        sent_by_convicted = sent_by(np.take_along_axis(convicted, evidence.served, 1))
        # Of two, each is all that the other can be held against.
        if self.fences.has_majority and sent_by_convicted.any():
            by_convicted = np.broadcast_to(sent_by_convicted[..., None], whole.shape)
            sound = whole & ~by_convicted & ~followers(by_convicted)
        if self.fences.compares_replicas and not twins:
            self.content.step(heard.compared, whole, self.fences.iqr)
        by_row = heard.by_row
        firm = np.logical_or.reduce(by_row, axis=0)
        room, hard = self.content.room, self._table.hard
        held = Held(self.fences, heard.compared, by_row, hard, room, sent_by_convicted, warming_up)
        cascade = hold_against_fences(held, self.fences, firm, whole, sound)
        turned = self.fences.centre.end_turns() & ~self._table.hard[:, None, None]
        within = np.ones(held.residuals.shape[:-1], bool)
        scores, added = held.largest, None
        counted = whole & ~cascade
        counted[BACKWARD] &= ~heard.nothing.void
        if self._mesh.replicas >= LEAST_REPLICAS and not twins:
            added = self._add_up(held.residuals, counted, evidence, served_before, convicted, warming_up)
            scores = np.maximum(scores, np.where(counted, np.maximum.reduce(added, axis=0)[..., None], 0.0))
            within[self._table.of_pair] = self.cusum.quiet(evidence.served) | self.content.unlike
        return Measured(held, held.residuals, scores, firm, turned, added, counted, within, self.content.unlike)

    def learn(
        self,
        heard: Heard,
        measured: Measured,
        clean_links: np.ndarray,
        suspected: np.ndarray,
        content: np.ndarray,
        step: int,
    ) -> None:
        """Learn from a step.

        Args:
            heard, measured: the step.
            clean_links: bool [2, L, C], of whose messages all are clean.
            suspected: bool [C], columns in which something went wrong.
            content: bool [2, L, C, M], alarms that content explains.
            step: the engine's global step.
        """
        if not clean_links.any():
            return
        chosen = clean_links
        if suspected.any():
            # One message just inside a fence may break the next, and would be learnt as the fence's own tail.
            whole_columns = chosen & ~suspected
            chosen = np.where(whole_columns.any(-1, keepdims=True), whole_columns, chosen)
        clean_messages = np.broadcast_to(chosen[..., None], heard.disputes.shape)
        followed = clean_messages
        if content.any():
            of_pair = self._table.of_pair[:, None, None, None, None]
            followed = np.where(of_pair, clean_messages, clean_messages | content)
        self.fences.learn(
            heard.compared, measured.residuals, clean_messages, followed, measured.within, measured.unlike, step
        )

    def follow(self, measured: Measured, content: np.ndarray) -> None:
        """In a step that is lost, of which nothing else is learnt, let what is usual of a column follow its content.

        Args:
            measured: the step.
            content: bool [2, L, C, M], alarms that content explains.
        """
        followed = content & ~self._table.of_pair[:, None, None, None, None]
        if self.fences.compares_replicas and followed.any():
            within, explained = np.ones_like(measured.within), np.ones(measured.within.shape[-1], bool)
            self.fences.usual.learn(measured.residuals, followed, within, explained, self.fences.reach)

    def take_for_usual(
        self, residuals: np.ndarray, strikes: np.ndarray, cleared: np.ndarray, served: np.ndarray, of_twins: bool
    ) -> None:
        """What lasts of those who are cleared (bool [S, R]) is their own new normal.

        Args:
            residuals: float64 [K, 2, L, C, M].
            strikes: bool [2, L, C, M], messages that tell against their senders.
            cleared: bool [S, R].
            served: int [S, C], who served each column.
            of_twins: in a twin step nothing stands out of anybody's data.
        """
        if not of_twins:
            self.standing.step(residuals, np.asarray(strikes.any(-1)), served)
        elif cleared.any():
            links, mean = self.standing.lasting(cleared)
            self.fences.usual.adopt(links, mean)
            self.cusum.forget(cleared)

    def forget(self, workers: np.ndarray) -> None:
        """Hold nothing against these, bool [S, R]: they are others than before."""
        self.standing.forget(workers)
        self.cusum.forget(workers)

    def _add_up(
        self,
        residuals: np.ndarray,
        counted: np.ndarray,
        evidence: Evidence,
        served_before: np.ndarray,
        convicted: np.ndarray,
        warming_up: bool,
    ) -> np.ndarray:
        """Scores of what has added up, float64 [statistics of pairs, 2, L, C]."""
        served = evidence.served
        # What is usual of a worker came of the data that it was given. Of one that is dealt anew in every step it is a
        # mean over all columns.
        if not self._shuffles and (served != served_before).any():
            self.cusum.forget_usual(columns_of(served) != columns_of(served_before))
        # With what is usual of a column: sums have a usual of their own, which stands still where they grow.
        level = np.where(self._table.adds_up[:, None, None, None], self.fences.usual.level, np.nan)
        return self.cusum.step(
            residuals[self._pair_rows],
            counted,
            served,
            convicted,
            evidence.step,
            warming_up,
            self.content.unlike,
            evidence.renewed,
            level[self._table.of_pair],
        )
