"""When replicas are compared, and what follows, with the other ranks' words and deeds made up."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepspeed_sentinel.engine import comparison as module
from deepspeed_sentinel.engine.comparison import WeightComparison
from deepspeed_sentinel.errors import SentinelError, WeightsDiffer
from deepspeed_sentinel.evidence.weights import Comparison, layout, tensors_digest
from deepspeed_sentinel.mesh import Worker

RANKS = np.array([[0, 2, 4], [1, 3, 5]])  # not in the order of stages, on purpose
HERE = Worker(1, 0)
OTHER = 12345  # a digest that nobody else has


class World:
    """Six ranks of which five are made up. ``odd[worker]``: the digest it tells, until it is healed by ``healers``."""

    def __init__(self, monkeypatch, every=5, lenient=False, step=0, ranks=RANKS):
        parameter = torch.nn.Parameter(torch.arange(4.0))
        self.engine = SimpleNamespace(global_steps=step, module=None, optimizer=None, device="cpu", mpu=None)
        self.engine.mpu = SimpleNamespace(get_data_parallel_group=lambda: "group")
        monkeypatch.setattr(module, "replicated", lambda engine: [parameter])
        monkeypatch.setattr(module, "heal", self.heal)
        self.right = int(tensors_digest([parameter], torch.device("cpu")))
        self.layout = layout([parameter])
        self.odd, self.layouts, self.healers = {}, {}, set(range(6))
        self.gathers, self.heals, self.told = 0, [], []
        self.ranks = ranks
        self.comparison = WeightComparison(
            self.engine, HERE, ranks, self, SimpleNamespace(weights=self.tell), every=every, lenient=lenient
        )

    def all_gather(self, mine):
        assert mine.tolist() == [self.right, self.layout]
        self.gathers += 1
        said = mine.repeat(self.ranks.size, 1)
        for (stage, replica), digest in self.odd.items():
            said[self.ranks[stage, replica], 0] = digest
        for (stage, replica), other in self.layouts.items():
            said[self.ranks[stage, replica], 1] = other
        return said

    def heal(self, tensors, source, receivers, group, device):
        assert group == "group"
        self.heals.append((source, list(receivers)))
        if source in self.healers:
            # the other stage sees to itself at the same time
            self.odd = {
                worker: digest
                for worker, digest in self.odd.items()
                if worker[0] == HERE.stage and self.ranks[worker] not in receivers
            }

    def tell(self, *told):
        self.told.append(told)

    def steps_compared(self, steps):
        compared = []
        for step in steps:
            self.engine.global_steps, before = step, self.gathers
            self.comparison.begin_step()
            if self.gathers > before:
                compared.append(step)
        return compared


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def test_due_every_so_many_steps_and_after_a_load(world):
    assert world.steps_compared(range(12)) == [5, 10]
    world.comparison.after_load()
    assert world.steps_compared([3, 4, 5, 6]) == [3, 5]
    assert world.comparison.last == Comparison(5, (), False) and not world.told


def test_due_at_once_where_training_goes_on(monkeypatch):
    assert World(monkeypatch, step=7).steps_compared([7, 8]) == [7]


def test_switched_off_it_is_never_due_but_can_be_asked_for(monkeypatch):
    world = World(monkeypatch, every=0, step=7)
    world.comparison.after_load()
    assert world.steps_compared(range(7, 12)) == []
    assert world.comparison.compare() == Comparison(11, (), False)


def test_one_replica_has_nothing_to_compare_with(monkeypatch):
    world = World(monkeypatch, step=7, ranks=np.array([[0], [1]]))
    world.comparison.after_load()
    assert world.steps_compared(range(7, 12)) == []
    assert world.comparison.compare() == Comparison(11, (), False) and world.gathers == 0


def test_a_minority_is_healed_from_the_first_of_the_majority(world):
    world.odd = {(1, 0): OTHER, (0, 2): OTHER}
    found = world.comparison.compare()
    assert found == Comparison(0, (Worker(0, 2), Worker(1, 0)), True) and found is world.comparison.last
    assert world.heals == [(3, [1])], "in this rank's stage; the other one sees to itself"
    assert [told[0] for told in world.told] == [found]


def test_who_lies_about_what_it_sends_is_followed_by_the_next(world):
    world.odd, world.healers = {(1, 0): OTHER}, {5}
    assert world.comparison.compare().healed
    assert world.heals == [(3, [1]), (5, [1])] and world.gathers == 3


def test_who_stays_unequal_is_named_and_ends_nothing(world):
    world.odd, world.healers = {(1, 2): OTHER}, set()
    assert world.comparison.compare() == Comparison(0, (Worker(1, 2),), False)
    assert world.heals == [(1, [5]), (3, [5])]


def test_who_holds_tensors_of_other_shapes_is_sent_nothing(world):
    world.odd, world.layouts = {(1, 2): OTHER}, {(1, 2): 1}
    assert world.comparison.compare() == Comparison(0, (Worker(1, 2),), False)
    assert not world.heals and world.gathers == 1


def test_one_of_the_majority_that_tells_another_layout_keeps_nobody_from_being_healed(world):
    world.odd, world.layouts = {(1, 0): OTHER}, {(1, 1): 1}
    assert world.comparison.compare().healed
    assert world.heals == [(5, [1])]


def test_without_a_majority_all_ranks_stop_and_nobody_is_accused(world):
    world.engine.global_steps = 10
    world.odd = {(0, 1): OTHER, (0, 2): OTHER + 1, (1, 2): OTHER}
    with pytest.raises(WeightsDiffer) as raised:
        world.comparison.compare()
    assert isinstance(raised.value, SentinelError) and not world.heals
    for part in ("step 10", "stage 0", "replica 1) holds", f"{OTHER:016x}", "no checkpoint", "last checkpoint"):
        assert part in str(raised.value)
    assert world.comparison.last == Comparison(10, (Worker(1, 2),), False, undecided=(0,))
    assert len(world.told) == 1


def test_observed_it_is_told_and_no_more(monkeypatch):
    world = World(monkeypatch, lenient=True)
    world.odd = {(0, 1): OTHER, (0, 2): OTHER + 1, (1, 2): OTHER}
    assert world.comparison.compare() == Comparison(0, (Worker(1, 2),), False, undecided=(0,))
    assert not world.heals and world.gathers == 1 and len(world.told) == 1


def test_what_one_comparison_of_a_step_found_holds_though_the_next_finds_it_healed(world):
    world.engine.global_steps, world.odd[1, 2] = 5, OTHER
    world.comparison.begin_step()
    world.comparison.compare()
    assert world.comparison.last.unequal == () and world.comparison.unequal_in(5) == (Worker(1, 2),)
    assert world.comparison.unequal_in(6) == ()
    world.comparison.after_load()
    assert world.comparison.unequal_in(5) == (), "the step comes again"
