from dataclasses import replace

import numpy as np
from synthetic import World

from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.judgement.verdict import Dispute
from deepspeed_sentinel.mesh import FORWARD, Worker

COSINE, ENERGY, GAIN = (NAMES.index(name) for name in ("transfer_cosine", "energy", "transfer_gain"))
CULPRIT = Worker(1, 2)


def framed(values):
    values[:, FORWARD, 1, 2, :2, COSINE] = 0.1


def warm(**changes):
    world = World(**changes)
    world.warm_up()
    return world


def dispute(finding):
    return Dispute(FORWARD, 1, 2, Worker(0, 2), Worker(2, 2), finding.worker, finding.micro_batches, "refuted")


def test_findings_say_what_they_rest_on():
    world = warm()
    (finding,) = world.step(framed).findings
    assert finding.rests_on_pair and finding.telling == (0, 1) and finding.audit == ""

    def loud(values):
        framed(values)
        values[:, FORWARD, 1, 2, 0, ENERGY] *= 50

    assert not world.step(loud).findings[0].rests_on_pair


def test_an_open_finding_is_no_strike_and_stays_a_finding():
    world = warm()
    for _ in range(6):
        said = world.step(framed)
        opened = replace(said, findings=tuple(replace(one, audit="open") for one in said.findings))
        after = world.judge.retract(opened, opened.findings, ())
        assert after.findings == opened.findings and after.excluded.tolist() == [False, False, True]
        assert not after.newly_convicted and not after.convicted.any()
    assert not world.judge.record.strikes.any()


def test_a_conviction_of_this_step_is_taken_back_with_the_halt_that_it_caused():
    world = warm(action="halt", strikes=2)
    world.step(framed)
    said = world.step(framed)
    assert said.newly_convicted == (CULPRIT,) and said.halt
    ruled = replace(said, findings=(), disputed=tuple(map(dispute, said.findings)))
    after = world.judge.retract(ruled, (), said.findings)
    assert not after.newly_convicted and not after.convicted.any() and after.halt is None
    assert world.judge.record.strikes[CULPRIT] == 1
    assert after.digest() != said.digest()


def test_other_strikes_of_the_step_stand():
    def two(values):
        framed(values)
        values[:, FORWARD, 1, 0, :, ENERGY] *= 50

    world = warm(strikes=1)
    said = world.step(two)
    assert set(said.newly_convicted) == {CULPRIT, Worker(1, 0)}
    opened = tuple(one for one in said.findings if one.worker == CULPRIT)
    assert world.judge.retract(said, opened, ()).newly_convicted == (Worker(1, 0),)


def test_a_refuted_finding_counts_as_a_lasting_dispute():
    world = warm(action="halt")
    for step in range(3):
        said = world.step(framed)
        ruled = replace(said, findings=(), disputed=tuple(map(dispute, said.findings)))
        after = world.judge.retract(ruled, (), said.findings)
        assert bool(after.halt) == (step == 2)
    assert "lasting dispute over link 1, column 2" in after.halt


def test_what_lies_added_up_is_taken_back_too():
    """Else a neighbour could raise an honest worker's sums with lies, and let honest steps convict it."""

    def slightly(values):
        values[:, FORWARD, 1, 2, :, GAIN] += 0.02

    def sums():
        return world.judge.cusum.state_dict()["sums"][..., FORWARD, 1, 2].max()

    world = World(replicas=5)
    world.warm_up(60)
    while not (said := world.step(slightly)).findings:
        before = sums()
    assert said.findings[0].telling == (0, 1, 2, 3), "no fence accuses"
    assert sums() > before
    world.judge.retract(said, said.findings, ())
    assert sums() == before
    said = world.step(slightly)
    world.judge.retract(replace(said, findings=()), (), said.findings)
    assert sums() == 0
    assert not any(world.step().findings for _ in range(5))


def test_a_step_taken_back_leaves_the_state_of_one_that_never_accused():
    one, other = warm(seed=3), warm(seed=3)
    said = one.step(framed)
    one.judge.retract(said, said.findings, ())
    other.step(framed)
    record, accused = one.judge.record.state_dict(), other.judge.record.state_dict()
    assert not record["struck"].any() and accused["struck"].any()
    assert np.array_equal(record["position"], accused["position"])
    assert record["quiet_steps"][CULPRIT] == 31 and accused["quiet_steps"][CULPRIT] == 0
