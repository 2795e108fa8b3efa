"""What the two ends of each message tell of a step, held against each other before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import NAMES, RECEIVED, SENT, Rows, comparable
from deepspeed_sentinel.judgement.contradiction import Contradictions, contradictions
from deepspeed_sentinel.judgement.fences import Fences
from deepspeed_sentinel.judgement.nothing import Made, Nothing
from deepspeed_sentinel.judgement.passing import Passing
from deepspeed_sentinel.judgement.reports import Reports
from deepspeed_sentinel.judgement.silence import Silence
from deepspeed_sentinel.mesh import BACKWARD

_PASSED_ON, _FROM_NOTHING = NAMES.index("passed_on"), NAMES.index("from_nothing")


@dataclass(frozen=True)
class Heard:
    """The messages of one step as they are told of.

    Attributes:
        reports: statistics as both ends report them.
        values: float64 [K, 2, L, C, M], those that are judged.
        compared: of the same shape, in the units that fences compare; NaN where neither report is to be used.
        by_hard: float64 [hard rows, 2, L, C, M], what needs no fence: anything above 0 is an alarm.
        found: bool [2, L, C, M], those alarms that the judge finds itself.
        hard: bool [2 ends, 2, L, C, M], broken messages as each end reports them.
        nothing: gradients that carry nothing.
        changed: int [2, L, C, M], tensors that should have been passed on unchanged and were not.
        said: where reports give different numbers.
        silent: bool [2, L, C, M], messages of whose sender the neighbours should have something to say and have not.
        differ: bool [2, L, C, M], messages of which the two ends say for certain different things.
        contradicted: bool [2, L, C, M], messages that are in dispute between the two ends.
        disputes: bool [2, L, C, M], those and the ones that are between the neighbours of their sender.
    """

    reports: Reports
    values: np.ndarray
    compared: np.ndarray
    by_hard: np.ndarray
    found: np.ndarray
    hard: np.ndarray
    nothing: Made
    changed: np.ndarray
    said: Contradictions
    silent: np.ndarray
    differ: np.ndarray
    contradicted: np.ndarray
    disputes: np.ndarray

    @property
    def by_row(self) -> np.ndarray:
        """Alarms that need no fence, which are on a way of their own that no statistic can close."""
        return self.by_hard > 0

    @property
    def whole(self) -> np.ndarray:
        """Finite messages that nobody disputes, bool [2, L, C, M]."""
        return ~(self.disputes | self.hard[RECEIVED])

    @property
    def contested(self) -> np.ndarray:
        """Messages that are in dispute between the neighbours of their sender, bool [2, L, C, M]."""
        return self.said.by_neighbours | self.silent

    @property
    def facts(self) -> np.ndarray:
        """Messages about which the ends contradict each other by numbers of their own, bool [2, L, C, M]."""
        facts = self.differ | self.said.certain
        facts[BACKWARD] |= self.nothing.disputed
        return np.asarray(facts)

    def with_forged(self, forged: np.ndarray) -> Heard:
        """With disputes (bool [2, L, C, M]) that a twin step has shown."""
        differ, contradicted, disputes = (which | forged for which in (self.differ, self.contradicted, self.disputes))
        return replace(self, differ=differ, contradicted=contradicted, disputes=disputes)


@dataclass(frozen=True)
class Hearing:
    """Hears steps, with what was learnt of the model.

    Attributes:
        table: the rows judged.
        fences: whose ranges tell how far reports may lie apart.
        passing, nothing, silence: what is known of which stage.
    """

    table: Rows
    fences: Fences
    passing: Passing
    nothing: Nothing
    silence: Silence

    def step(self, evidence: Evidence, warming_up: bool) -> Heard:
        """Hear one step."""
        served = evidence.served
        reports = Reports.of(evidence.statistics)
        nothing = self.nothing.step(reports, evidence.digests, served, warming_up)
        values = reports.judged(self.table, nothing.void)
        hard = reports.hard
        compared = comparable(values)
        differ = hard[SENT] != hard[RECEIVED]
        other_digests = evidence.digests[SENT] != evidence.digests[RECEIVED]
        if other_digests.any():
            differ |= other_digests.any(-1)
        said = Contradictions.none(differ.shape, len(self.table))
        if not (warming_up or reports.alike):
            # As reported: of what is not judged, too, nobody may say other things than its partner.
            said = contradictions(reports, self.fences, self.table)
            if said.neither.any():
                values[said.neither] = compared[said.neither] = np.nan
        contradicted = differ | said.by_ends
        contradicted[BACKWARD] |= nothing.disputed
        silent = self.silence.step(reports.received, nothing.void, served, warming_up)
        changed = self.passing.step(evidence.digests[RECEIVED], ~differ, served)
        by_hard, found = self._without_fence(values, changed, nothing.made)
        return Heard(
            reports=reports,
            values=values,
            compared=compared,
            by_hard=by_hard,
            found=found,
            hard=hard,
            nothing=nothing,
            changed=changed,
            said=said,
            silent=silent,
            differ=differ,
            contradicted=contradicted,
            disputes=contradicted | said.by_neighbours | silent,
        )

    def _without_fence(
        self, values: np.ndarray, changed: np.ndarray, made: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Hard rows, [hard rows, 2, L, C, M]: what is reported, and what the judge finds; and where it finds any."""
        hard = np.flatnonzero(self.table.hard).tolist()
        by_judge = [place for place, row in enumerate(hard) if self.table.by_judge[row]]
        result = values[hard]
        result[by_judge] = 0.0
        result[hard.index(_PASSED_ON)] = changed
        result[hard.index(_FROM_NOTHING), BACKWARD] = made
        return result, np.asarray((result[by_judge] > 0).any(0))
