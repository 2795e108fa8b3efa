"""Attackers in the simulator: act where they serve, remember by worker, act again the same."""

import numpy as np
import pytest
import torch

from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker
from deepspeed_sentinel.simulation.attackers import Attackers, Part, draw_attackers

ALL = Part((0, 1, 2, 3), (0, 1), again=False)
CULPRIT = Worker(1, 2)


def messages(step):
    """[C, M, B, T, D] whose every element tells step, column and micro-batch."""
    column, micro_batch = torch.meshgrid(torch.arange(4), torch.arange(2), indexing="ij")
    value = 1000.0 * (step + 1) + 10 * column + micro_batch
    return value[:, :, None, None, None].expand(4, 2, 1, 3, 5).clone()


def mesh_served(*stage_one):
    return np.array([range(4), stage_one, range(4), range(4)])


@pytest.fixture
def attackers(options):
    def build(attack, **changes):
        malicious = np.zeros((4, 4), bool)
        malicious[CULPRIT] = True
        return Attackers(options(attack=attack, **changes), malicious)

    return build


def tamper(attackers, step, served, part=ALL, direction=FORWARD, stage=1, entered=None):
    sent = messages(step)[list(part.columns)]
    entered = -sent if entered is None else entered
    return attackers.tamper(direction, stage, step, part, served, sent, entered, None)


def changed(sent, step, columns=(0, 1, 2, 3)):
    return [
        c for c, one, honest in zip(columns, sent, messages(step)[list(columns)], strict=True) if (one != honest).any()
    ]


def test_the_column_that_the_worker_serves_is_tampered_with(attackers):
    mine = attackers("scaling", start=3)
    served = mesh_served(3, 2, 0, 1)
    assert changed(tamper(mine, 2, served), 2) == []
    sent = tamper(mine, 3, served)
    assert changed(sent, 3) == [1] and torch.equal(sent[1], -messages(3)[1])
    assert changed(tamper(mine, 4, mesh_served(0, 1, 3, 2)), 4) == [3]
    assert changed(tamper(mine, 4, served, stage=2), 4) == []
    assert mine.acted_first[CULPRIT] == 3 and (mine.acted_first >= 0).sum() == 1


def test_direction(attackers):
    mine = attackers("scaling", direction="backward", start=0)
    assert changed(tamper(mine, 0, mesh_served(0, 1, 2, 3)), 0) == []
    assert changed(tamper(mine, 0, mesh_served(0, 1, 2, 3), direction=BACKWARD), 0) == [2]


def test_delay_sends_the_workers_own_message_whichever_column_it_serves(attackers):
    mine = attackers("delay", attack_arguments={"steps": 2}, start=3)
    columns = [0, 1, 2, 3, 0, 1]
    for step, column in enumerate(columns):
        row = [0, 1, 3, 2]
        row[row.index(2)], row[column] = row[column], 2
        sent = tamper(mine, step, mesh_served(*row))
        expected = messages(step - 2)[columns[step - 2]] if step >= 3 else messages(step)[column]
        assert torch.equal(sent[column], expected)
        mine.end_step(step)


def test_replay_sends_its_message_before(attackers):
    mine = attackers("replay", start=1)
    served = mesh_served(0, 1, 2, 3)
    tamper(mine, 0, served)
    mine.end_step(0)
    sent = tamper(mine, 1, served)
    assert torch.equal(sent[2, 1], messages(1)[2, 0])
    assert torch.equal(sent[2, 0], messages(0)[2, 1])


def test_pass_through_sends_what_entered(attackers):
    mine = attackers("pass_through", start=0)
    sent = tamper(mine, 0, mesh_served(0, 1, 2, 3), direction=BACKWARD)
    assert torch.equal(sent[2], -messages(0)[2])


@pytest.mark.parametrize("attack", ["random_value", "replay", "delay", "intermittent", "surrogate", "mixed"])
def test_repeating_a_step_with_fewer_columns_repeats_the_attack(attackers, attack):
    mine = attackers(attack, start=1, attack_arguments={"steps": 1} if attack == "delay" else {})
    served = mesh_served(2, 0, 1, 3)
    for step in range(6):
        first = tamper(mine, step, served)
        fewer = Part((0, 1, 3), (0, 1), again=True)
        again = tamper(mine, step, served, fewer)
        assert torch.equal(again, first[[0, 1, 3]])
        mine.end_step(step)


def test_false_reports_leave_the_message_alone(attackers):
    mine = attackers("framing", start=1, verifier="receiver")
    served, received = mesh_served(3, 2, 0, 1), messages(1)
    assert tamper(mine, 1, served) is not None and changed(tamper(mine, 1, served), 1) == []
    assert mine.false_reports(FORWARD, 1, 0, ALL, served, received) is received
    assert changed(mine.false_reports(FORWARD, 1, 1, ALL, served, received), 1) == [1]
    assert changed(mine.false_reports(FORWARD, 2, 1, ALL, served, received), 1) == []
    assert torch.equal(received, messages(1))


def test_colluders_vouch_for_each_other_only(options):
    malicious = np.zeros((4, 4), bool)
    malicious[1, 2] = malicious[2, 0] = True
    mine = Attackers(options(attack="collusion", verifier="receiver", start=1), malicious)
    together = np.array([range(4), [0, 2, 1, 3], [1, 0, 2, 3], range(4)])
    assert mine.vouched(1, 2, FORWARD, 1, ALL, together).nonzero().tolist() == [[1, 0], [1, 1]]
    assert not mine.vouched(1, 2, FORWARD, 0, ALL, together).any()
    assert not mine.vouched(2, 3, FORWARD, 1, ALL, together).any()
    assert not mine.vouched(1, 2, FORWARD, 1, ALL, np.tile(np.arange(4), (4, 1))).any()


def test_attackers_are_drawn_from_the_middle_stages():
    drawn = draw_attackers(Mesh(5, 6), 2, seed=3)
    assert drawn.sum(1).tolist() == [0, 2, 2, 2, 0]
    assert (drawn == draw_attackers(Mesh(5, 6), 2, seed=3)).all()
    assert (drawn != draw_attackers(Mesh(5, 6), 2, seed=4)).any()
