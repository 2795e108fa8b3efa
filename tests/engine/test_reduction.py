"""What the watch over a twin step's reduction says, with the other ranks' words made up."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepspeed_sentinel.engine.reduction import Reduction
from deepspeed_sentinel.mesh import Worker

STAGES, SIZE, HERE = 3, 40_000, Worker(1, 0)


class World:
    """All ranks but HERE are made up. ``handed[replica]``: what a replica of its stage handed over, if not ones."""

    def __init__(self, replicas=3):
        self.ranks = np.arange(STAGES * replicas).reshape(STAGES, replicas)
        self.included = np.ones(self.ranks.shape, bool)
        self.handed, self.wrong, self.gathers = {}, set(), 0
        parameter = torch.nn.Parameter(torch.zeros(SIZE))
        parameter.grad = torch.ones(SIZE)
        module = torch.nn.Module()
        module.weight = parameter
        self.engine = SimpleNamespace(
            global_steps=7,
            device="cpu",
            communication_data_type=torch.float32,
            fp16_enabled=lambda: False,
            optimizer=None,
            module=module,
        )

    def all_gather(self, mine):
        self.gathers += 1
        said = mine.repeat(self.ranks.size, 1)
        if self.gathers == 1:
            said[:, 0] = 0
            for worker in self.wrong:
                said[self.ranks[worker], 0] = 1
        else:
            for replica, gradients in self.handed.items():
                said[self.ranks[1, replica], 0] = self.shown(gradients)
        said[self.ranks[HERE]] = mine
        return said

    def shown(self, gradients):
        """What a rank that handed this over tells the others, found by being that rank."""
        other = World(self.ranks.shape[1])
        other.engine.module.weight = torch.nn.Parameter(torch.zeros(gradients.shape))
        other.engine.module.weight.grad = gradients.clone()
        seen = []
        other.all_gather = lambda mine: seen.append(mine) or torch.ones_like(mine).repeat(other.ranks.size, 1)
        other.watch(lambda: None)
        return int(seen[-1][0])

    def watch(self, reduce):
        self.gathers = 0
        return Reduction(self.engine, HERE, self.ranks, self).watch(reduce, self.included, 1.0)

    def altered(self):
        return self.watch(lambda: self.engine.module.weight.grad.mul_(3.0))


def flipped(at=20_000):
    gradients = torch.ones(SIZE)
    gradients[at] = 9
    return gradients


def test_a_right_reduction_is_no_news():
    world = World()
    assert world.watch(lambda: None) is None and world.gathers == 1


@pytest.mark.parametrize("at", [0, 11_111, SIZE - 1])
def test_one_changed_number_is_named_wherever_it_lies(at):
    for _ in range(4):
        world = World()
        world.handed[2] = flipped(at)
        assert world.altered().named == (Worker(1, 2),)


def test_where_nobody_shows_anything_else_nobody_is_named():
    found = World().altered()
    assert found.stages == (1,) and not found.named and "says what is not so" in str(found)


def test_a_majority_of_those_that_are_left_names_nobody_where_all_of_it_can_be_bad():
    world = World(replicas=5)  # of whom two may be bad: here those that are left beside an honest one
    world.included[:, 3:] = False
    world.handed = {1: flipped(), 2: flipped()}
    assert world.altered().named == ()
    world.included[:] = True  # three of five alike: one of them is honest at least
    assert world.altered().named == (Worker(1, 1), Worker(1, 2))


def test_of_two_replicas_nobody_is_named():
    world = World(replicas=2)
    world.handed[1] = flipped()
    assert world.altered().named == ()


def test_who_is_left_out_has_no_word():
    world = World()
    world.included[:, 2] = False
    world.wrong = {Worker(1, 2), Worker(0, 2)}
    assert world.watch(lambda: None) is None
    world.wrong.add(Worker(1, 1))
    found = world.watch(lambda: None)
    assert found.said_by == (Worker(1, 1),) and found.stages == (1,) and str(Worker(1, 1)) in str(found)


def test_who_is_left_out_watches_nothing():
    world = World()
    world.included[HERE] = False
    assert world.altered() is None


def sparse(*rows, value=1.0, size=9):
    values = torch.full((len(rows), 2), value)
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.int64), values, (size, 2))


def watched(handed_over, outcome):
    world = World()
    weight = world.engine.module.weight = torch.nn.Parameter(torch.zeros(9, 2))
    weight.grad = handed_over

    def reduce():
        weight.grad = outcome

    return world.watch(reduce)


def test_the_outcome_of_a_sparse_gradient_is_held_against_it_row_by_row():
    """DeepSpeed puts what all replicas handed over one behind the other, each its share."""
    three = sparse(*[1, 4] * 3, value=1 / 3)
    assert watched(sparse(1, 4, 4, value=0.5), sparse(1, 4, value=0.5) + sparse(4, value=0.5)) is None
    assert watched(sparse(1, 4), three) is None
    assert watched(sparse(), sparse()) is None
    for wrong in (sparse(1, 5), sparse(1), sparse(1, 4, 5), sparse(1, 4, value=1.01), sparse(1, 4, value=torch.nan)):
        assert watched(sparse(1, 4), wrong) is not None


def test_who_handed_over_other_rows_of_a_sparse_gradient_is_named():
    world = World()
    weight = world.engine.module.weight = torch.nn.Parameter(torch.zeros(9, 2))
    weight.grad = sparse(1, 4)
    world.handed[2] = sparse(1, 5)

    def reduce():
        weight.grad = sparse(1, 4, 5)

    assert world.watch(reduce).named == (Worker(1, 2),)
