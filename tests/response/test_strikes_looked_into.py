"""When the gate has a strike looked into before it counts."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from accusation import ACCUSED, MESH, Case, finding, verdict

from deepspeed_sentinel.engine.gate import Gate
from deepspeed_sentinel.judgement.record import Record, Tried
from deepspeed_sentinel.response.audit import Outcome

NOBODY = np.zeros((MESH.stages, MESH.replicas), bool)
NOWHERE = np.zeros(MESH.stages, bool)
UNLIKE = Tried(NOBODY, NOBODY, np.arange(MESH.stages) == ACCUSED.stage, NOWHERE, NOWHERE, held=True)


@pytest.mark.parametrize(
    ("by_proof", "tried", "refused", "looked_into"),
    [
        (False, None, False, True),
        (True, None, False, False),
        (True, UNLIKE, False, True),
        (True, replace(UNLIKE, unlike=~UNLIKE.unlike), False, False),
        (True, None, True, True),
    ],
)
def test_a_strike_is_looked_into_wherever_it_may_come_to_convict(by_proof, tried, refused, looked_into):
    record = Record(MESH, strikes=3, window=20, probation=30, by_proof=by_proof)
    record.update(NOBODY, np.zeros((MESH.links, MESH.replicas), bool), tried, refused)
    held, opened = [], []
    judge = SimpleNamespace(record=record, retract=lambda said, open_, refuted: opened.extend(open_) or said)
    hearing = SimpleNamespace(hold=lambda audits, evidence, layout: held.extend(audits) or [Outcome.OPEN])
    Gate._audit(SimpleNamespace(judge=judge, hearing=hearing, _layout=None), verdict(finding()), Case().evidence)
    assert bool(held) == bool(opened) == looked_into
