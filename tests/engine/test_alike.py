"""What of a left-out column's buffers stays, and what goes back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepspeed_sentinel.engine.alike import Alike, settle, sound
from deepspeed_sentinel.engine.buffers import NO_LAYOUT, UNMOVED, ForwardState
from deepspeed_sentinel.mesh import Worker

POISON = float("nan")


def step(replicas, states, inputs, took_part, index=0):
    """One step of a stage's replicas, as their ``Alike`` ends it."""
    for module, state, x in zip(replicas, states, inputs, strict=True):
        state.begin_step()
        module(torch.as_tensor(x))
        state.moved(thorough=True)
    told = np.stack([state.digests(-1 - replica).numpy() for replica, state in enumerate(states)])
    _, stays, gifts = settle(np.array(took_part), told, index)
    given = {
        (receiver, gift.index): states[gift.source].value(gift.index) for gift in gifts for receiver in gift.receivers
    }
    for replica, state in enumerate(states):
        mine = {place: value for (receiver, place), value in given.items() if receiver == replica}
        state.end_step(took_part[replica], np.flatnonzero(stays[replica]).tolist(), mine)


def test_what_is_sound():
    digests = np.array([[7, 1, 4], [7, 2, 4], [7, 3, 5]])
    held, known = sound(digests, np.array([True, True, False]))
    assert known.tolist() == [True, False, True] and held[known].tolist() == [7, 4]
    held, known = sound(digests, np.array([False, True, False]))
    assert known.tolist() == [True, False, True] and held[known].tolist() == [7, 4], "of all, one of them took part"
    held, known = sound(digests, np.array([False, False, True]))
    assert known.tolist() == [True, False, False], "one bad neighbour may have sent both the same"
    assert not sound(np.array([[7], [8]]), np.array([True, False]))[1].any()
    assert sound(np.array([[7], [7]]), np.array([True, False]))[1].all()


@given(st.integers(2, 7), st.data())
def test_fewer_than_half_of_the_replicas_decide_nothing(replicas, data):
    """Whatever liars tell, and whoever is left out: what is sound is what the honest ones that took part hold."""
    liars = data.draw(st.sets(st.integers(0, replicas - 1), max_size=(replicas - 1) // 2))
    took_part = np.array(data.draw(st.lists(st.booleans(), min_size=replicas, max_size=replicas)))
    within = [replica for replica in np.flatnonzero(took_part) if replica in liars]
    digests = np.full((replicas, 1), 5)
    for liar in liars:
        digests[liar] = data.draw(st.integers(0, 6))
    held, known = sound(digests, took_part)
    if known[0] and 2 * len(within) < np.count_nonzero(took_part):
        assert held[0] == 5
    if took_part.any() and not liars:
        assert known[0]


class Changing(nn.Module):
    """What replicas may change alike in each pass; ``way`` is how it gets into the buffer."""

    def __init__(self, kind, way="in place"):
        super().__init__()
        self.kind, self.way, self.passes, self.name = kind, way, 0, "first"
        self.register_buffer("held", torch.ones(3))

    def forward(self, x):
        finite = bool(torch.as_tensor(x).isfinite().all())
        self.passes += {"counted": 1, "sound batches": finite}.get(self.kind, 0)
        self.name = f"pass {self.passes}"
        new = {
            "counted": self.held + 1,
            "annealed": self.held * 0.97,
            "sound batches": self.held + finite,
            "running": 0.9 * self.held + x,
        }[self.kind]
        if self.way == "in place":
            self.held.copy_(new)
        elif self.way == "data":
            self.held.data.copy_(new)
        else:
            self.held = new
        return self.held * x


ALIKE = ("counted", "annealed", "sound batches")


@pytest.mark.parametrize("way", ["in place", "data", "assigned"])
@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("first", [0, 1, 5])
def test_replicas_make_the_same_of_the_same_after_one_of_them_was_left_out(kind, way, first):
    """Else the next twin step proves the one that was left out, which is honest."""
    replicas = [Changing(kind, way) for _ in range(3)]
    states = [ForwardState(nn.Sequential(module)) for module in replicas]
    for index in range(first + 3):
        out = index == first
        step(replicas, states, (1.0, 2.0, POISON if out else 3.0), (True, True, not out), index)
    made = [module(torch.ones(())).tolist() for module in replicas]
    assert made[2] == made[0] == made[1]
    assert replicas[2].passes == replicas[0].passes and replicas[2].name == replicas[0].name


@pytest.mark.parametrize("way", ["in place", "data", "assigned"])
def test_what_follows_the_data_goes_back(way):
    replicas = [Changing("running", way) for _ in range(3)]
    states = [ForwardState(nn.Sequential(module)) for module in replicas]
    for _ in range(2):
        step(replicas, states, (1.0, 2.0, 3.0), (True, True, True))
    before = [module.held.clone() for module in replicas]
    step(replicas, states, (1.0, 2.0, POISON), (True, True, False))
    assert torch.equal(replicas[2].held, before[2])
    assert not torch.equal(replicas[0].held, before[0]), "who took part goes on"
    step(replicas, states, (POISON, POISON, 1.0), (False, False, True))
    assert not any(module.held.isnan().any() for module in replicas), "two that one bad neighbour had"


def test_most_columns_left_out_still_count():
    replicas = [Changing("annealed") for _ in range(3)]
    states = [ForwardState(nn.Sequential(module)) for module in replicas]
    step(replicas, states, (1.0, POISON, POISON), (True, False, False))
    assert [module.held[0].item() for module in replicas] == [pytest.approx(0.97)] * 3


def test_what_cannot_be_compared_goes_back():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("held", torch.eye(2).to_sparse())

        def forward(self, x):
            self.held = (2 * torch.eye(2)).to_sparse()

    replicas = [Sparse() for _ in range(3)]
    states = [ForwardState(module) for module in replicas]
    step(replicas, states, (1.0, 1.0, 1.0), (True, True, False))
    assert [module.held.to_dense()[0, 0].item() for module in replicas] == [2.0, 2.0, 1.0]


def test_only_what_fits_is_given_and_by_turns():
    told = np.array([[[7, 1], [4, 1]], [[7, 1], [4, 1]], [[6, 1], [5, 2]]])
    took_part = np.array([True, True, False])
    _, stays, gifts = settle(took_part, told, step=0)
    assert [(gift.index, gift.source, gift.receivers) for gift in gifts] == [(0, 0, (2,))]
    assert stays.tolist() == [[True, True], [True, True], [False, False]]
    assert settle(took_part, told, step=1)[2][0].source == 1
    told[..., 1] = NO_LAYOUT
    assert not settle(took_part, told, step=0)[2]
    told[:2, 0, 0] = UNMOVED
    assert not settle(took_part, told, step=0)[2], "it goes back to where they are"


class Row:
    """Stands for the control groups of one replica; the others of its stage tell what they are told to tell."""

    def __init__(self, others):
        self.others, self.sizes = others, []

    def all_gather(self, mine):
        self.sizes.append(len(mine))
        rest = [torch.as_tensor(other).flatten()[: len(mine)] for other in self.others]
        return torch.stack([*(nn.functional.pad(one, (0, len(mine) - len(one))) for one in rest), mine])


def alike_of_the_last(others, replicas=3):
    module = Changing("annealed")
    state = ForwardState(module)
    ranks = np.arange(replicas)[None]
    alike = Alike(state, Worker(0, replicas - 1), ranks, Row(others), None, torch.device("cpu"))
    state.begin_step()
    module(torch.ones(3))
    return module, alike


def test_who_lists_other_things_has_no_say_and_costs_no_memory():
    """A replica that tells of a billion things, or of others, is alone with it."""
    _, twin = alike_of_the_last([])
    twin.words(left_out=True)
    told = twin._state.digests(-1)
    module, alike = alike_of_the_last([told, told])
    own = alike.words(left_out=True)
    words = np.array([[own, (1, 1 << 40, own[2]), own]])
    alike.end_step(np.array([[True, True, False]]), words, step=0)
    assert alike._control.sizes == [2 * own[1]]
    assert module.held[0] == pytest.approx(0.97), "of all, one took part: two hold it alike"
    module, alike = alike_of_the_last([told, told])
    alike.words(left_out=True)
    words = np.array([[own, own, (1, own[1], 5)]])
    alike.end_step(np.array([[True, True, False]]), words, step=0)
    assert module.held[0] == 1.0, "it lists other things than most, so nobody can tell"


@pytest.mark.parametrize("took_part", [[[True, True, True]], [[False, False, False]], [[True, True, False]]])
def test_nothing_is_told_where_nothing_hangs_on_it(took_part):
    module, alike = alike_of_the_last([])
    words = np.zeros((1, 3, 3), int)
    alike.end_step(np.array(took_part), words, step=0)
    assert not alike._control.sizes
    assert module.held[0] == pytest.approx(0.97 if took_part[0][-1] else 1.0)
