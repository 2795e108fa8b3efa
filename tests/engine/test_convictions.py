"""The file that says how to start without the convicted."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from deepspeed_sentinel.engine.convictions import Convictions
from deepspeed_sentinel.judgement.proof import Proof
from deepspeed_sentinel.mesh import FORWARD, Worker
from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.who import Who

CULPRIT = Worker(1, 0)
PROOF = Proof(CULPRIT, 0, FORWARD, (0,), 2, 3, trusted=False)
DEVICES = [[Device(f"node-{stage}", replica, name="cpu") for replica in range(2)] for stage in range(3)]


@pytest.fixture
def run(tmp_path, one_rank):
    """A run whose record can be set."""
    run = SimpleNamespace(convicted=np.zeros((3, 2), bool), step=7, file=tmp_path / "exclude.json")
    who = Who(np.arange(6).reshape(3, 2), DEVICES)
    run.convictions = Convictions(str(tmp_path), who, lambda: run.convicted, step=lambda: run.step)
    return run


def test_a_conviction_is_written_with_its_reason_and_taken_back_with_it(run):
    run.convicted[CULPRIT] = True
    verdict = SimpleNamespace(newly_convicted=(CULPRIT,), step=6, proofs=(PROOF,), contradicted=(), findings=())
    run.convictions.take(verdict)
    assert run.convictions.write() == run.file
    (worker,) = json.loads(run.file.read_text())["workers"]
    assert (worker["rank"], worker["step"]) == (2, 6) and "stage 1, replica 0 (rank 2, node-1, cpu) sent" in worker[
        "why"
    ]
    assert str(run.convictions.convicts[0]) == "stage 1, replica 0 (rank 2, node-1, cpu)"
    run.convicted[CULPRIT] = False
    run.convictions.write()
    assert json.loads(run.file.read_text())["workers"] == [], "it was released"


def test_what_an_earlier_run_left_stays_while_nobody_is_convicted(run):
    run.file.write_text("of an earlier run")
    assert run.convictions.write() is None and run.file.read_text() == "of an earlier run"


def test_who_was_convicted_before_this_run_is_told_of_as_that(run):
    run.convicted[CULPRIT] = True
    run.convictions.write()
    (worker,) = json.loads(run.file.read_text())["workers"]
    assert worker["step"] is None and worker["why"] == "convicted before this run"
