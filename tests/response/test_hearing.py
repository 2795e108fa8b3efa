"""Hearings of five stages in five threads, with queues in place of a process group."""

import queue
import threading
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from accusation import COLUMN, CPU, LAYOUT, MESH, Case, finding, verdict

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence.table import SENT
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.response import hearing
from deepspeed_sentinel.response.audit import Outcome, audits_due
from deepspeed_sentinel.response.hearing import Hearing

RANKS = np.arange(MESH.stages * MESH.replicas).reshape(MESH.stages, MESH.replicas)


class Wire:
    """The few functions of torch.distributed that a hearing uses, between threads."""

    def __init__(self, silent=None):
        self.silent = silent
        self.letters = defaultdict(queue.Queue)
        self.sent = []
        self.gathered = {}
        self.barrier = threading.Barrier(MESH.stages)
        self.here = threading.local()

    def send(self, tensor, dst, group):
        self.sent.append((self.here.rank, dst))
        if self.here.rank != self.silent:
            self.letters[self.here.rank, dst].put(tensor.clone())

    def irecv(self, tensor, src, group):
        return Letter(self.letters[src, self.here.rank], tensor)

    def all_gather_single(self, out, mine, group):
        self.gathered[self.here.rank] = mine
        self.barrier.wait(timeout=20)
        rows = [self.gathered.get(rank, torch.zeros_like(mine)) for rank in range(RANKS.size)]
        out.copy_(torch.cat(rows))


class Letter:
    def __init__(self, letters, into):
        self.letters, self.into = letters, into

    def wait(self, timeout):
        try:
            self.into.copy_(self.letters.get(timeout=timeout.total_seconds()))
        except queue.Empty:
            raise RuntimeError("Timed out waiting for recv operation to complete") from None


def hold(monkeypatch, case, wire, said=None, gives=None):
    """What every stage's worker of the column learns, or the error that it ends with."""
    monkeypatch.setattr(hearing, "dist", wire)
    audits = audits_due(said or verdict(finding()), case.evidence)
    learnt = {}

    def take_part(worker):
        wire.here.rank = int(RANKS[worker])

        def testify(end):
            return case.first if end[1] == SENT else case.second

        try:
            learnt[worker.stage] = Hearing(worker, RANKS, None, CPU, gives or testify).hold(
                audits, case.evidence, LAYOUT
            )
        except (SentinelError, threading.BrokenBarrierError) as error:
            if wire.here.rank not in wire.gathered:
                wire.barrier.abort()  # else the others wait for it
            learnt[worker.stage] = error

    threads = [threading.Thread(target=take_part, args=(Worker(stage, COLUMN),)) for stage in range(MESH.stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return [learnt[stage] for stage in range(MESH.stages)]


@pytest.mark.parametrize(("forged", "outcome"), [(1.0, Outcome.CONFIRMED), (-1.0, Outcome.REFUTED)])
def test_a_third_party_hears_both_neighbours_and_everybody_learns_its_outcome(monkeypatch, forged, outcome):
    wire = Wire()
    assert hold(monkeypatch, Case(forged=forged), wire) == [(outcome,)] * MESH.stages
    auditor, below, above = (int(RANKS[stage, COLUMN]) for stage in (0, 1, 3))
    assert sorted(set(wire.sent)) == [(below, auditor), (above, auditor)]


def test_a_neighbour_that_is_trusted_itself_sends_nothing(monkeypatch):
    wire = Wire()
    case = Case()
    said = verdict(finding(worker=Worker(1, COLUMN), link=1))
    outcomes = hold(monkeypatch, case, wire, said)
    # The digests are of other links, so the auditor finds that the messages are not those that crossed.
    assert outcomes == [(Outcome.REFUTED,)] * MESH.stages
    assert set(wire.sent) == {(int(RANKS[2, COLUMN]), int(RANKS[0, COLUMN]))}


def test_a_liar_in_its_statement_is_refuted(monkeypatch):
    case = Case()

    def gives(end):
        return case.first if end[1] == SENT else replace(case.second, seeds=(1, 2))

    assert hold(monkeypatch, case, Wire(), gives=gives) == [(Outcome.REFUTED,)] * MESH.stages


def test_who_sends_nothing_ends_the_run_by_name(monkeypatch):
    monkeypatch.setattr(hearing, "PATIENCE_SECONDS", 0.2)
    errors = hold(monkeypatch, Case(), Wire(silent=int(RANKS[3, COLUMN])))
    assert "worker (stage 3, replica 1) did not send what it kept for an audit" in str(errors[0])
    assert all(isinstance(error, threading.BrokenBarrierError) for error in errors[1:])


def test_an_auditor_without_an_outcome_ends_the_run(monkeypatch):
    wire = Wire()
    monkeypatch.setattr(hearing, "examine", lambda *_: None)
    for error in hold(monkeypatch, Case(), wire):
        assert "worker (stage 0, replica 1) gave no outcome of its audit of worker (stage 2, replica 1)" in str(error)
