"""Replicas of a stage are brought into one state, and nobody's word for its state excuses it from being compared."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from deepspeed_sentinel.engine.buffers import ForwardState
from deepspeed_sentinel.engine.shared_state import SharedState


class Row:
    """The exchanges of one stage's replicas, each in a thread of its own; ``lies`` alters what one of them says."""

    def __init__(self, replicas, lies=None):
        self.barrier = threading.Barrier(replicas, timeout=30)
        self.said, self.lies = [None] * replicas, lies or {}

    def of(self, replica):
        row = self

        class Control:
            def of_row(self, mine):
                return torch.stack(row.exchange(replica, mine))

            def of_replica(self, mine, source, most):
                said = row.exchange(replica, mine)[source]
                assert said.numel() <= most
                return said

        return Control()

    def exchange(self, replica, mine):
        self.said[replica] = self.lies[replica](mine.clone()) if replica in self.lies else mine.clone()
        self.barrier.wait()
        said = list(self.said)
        self.barrier.wait()
        return said


class Stage:
    """The replicas of a stage that share their states before each step."""

    def __init__(self, make, replicas=3, lies=None):
        self.modules = [nn.Sequential(make(replica)) for replica in range(replicas)]
        row, self.told = Row(replicas, lies), []
        self.shared = [
            SharedState(module, replica, row.of(replica), torch.device("cpu"), self.told.append)
            for replica, module in enumerate(self.modules)
        ]
        self.kept = [ForwardState(module) for module in self.modules]
        self.counted = np.ones(replicas, bool)

    def share(self, gives=True):
        words = [None] * len(self.shared)

        def run(replica):
            words[replica] = self.shared[replica].share(self.counted, gives)

        threads = [threading.Thread(target=run, args=[replica]) for replica in range(len(self.shared))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert None not in words
        return words

    def step(self, inputs, out=()):
        """A step on these inputs of the replicas, of which those ``out`` do not count."""
        for replica, (module, kept) in enumerate(zip(self.modules, self.kept, strict=True)):
            kept.begin_step()
            module(torch.as_tensor(inputs[replica]))
            kept.end_step(counts=replica not in out, all_count=not out)
        self.counted = np.array([replica not in out for replica in range(len(self.modules))])

    def outputs(self, x=1.0):
        return [module(torch.tensor(x)).tolist() for module in self.modules]


class Annealed(nn.Module):
    """Cools by a factor in each pass, which it counts in every way that people do."""

    def __init__(self, replica):
        super().__init__()
        self.register_buffer("heat", torch.ones(3))
        self.register_buffer("history", None)
        self.rank, self.where, self.tau, self.longest = replica, f"cuda:{replica}", np.float64(1.0), None
        self.seen = torch.zeros((), dtype=torch.int64)

    def forward(self, x):
        with torch.no_grad():
            self.heat *= 0.9
        self.tau *= 0.95
        self.seen = self.seen + 1
        self.history = torch.full((int(self.seen),), float(self.tau))
        self.longest = 2 * int(self.seen)
        return x * self.heat * float(self.tau) + self.history.sum() + self.seen + (self.longest or 0)


def test_who_was_left_out_is_given_the_state_of_the_others():
    stage = Stage(Annealed)
    for _ in range(4):
        assert len(set(stage.share())) == 1
        stage.step([1.0, 1.0, 1.0])
    stage.step([1.0, float("nan"), 1.0], out=[1])
    words = stage.share()
    assert len(set(words)) == 1
    made = stage.outputs()
    assert made[0] == made[1] == made[2]
    held = stage.modules[1][0]
    assert (held.rank, held.where, type(held.tau)) == (1, "cuda:1", np.float64), "what never moved is its own"
    assert len(stage.told) == 1 and "0.heat" in stage.told[0] and "0.tau" in stage.told[0]


@pytest.mark.parametrize("replicas", [3, 4, 5])
def test_who_says_that_its_state_is_another_one_is_told_from_nobody(replicas):
    """It is given the others' as often as it says so, and what it tells of it stands alone against most."""
    stage = Stage(Annealed, replicas, lies={1: lambda mine: mine + 1 if mine.dtype == torch.int64 else mine})
    for _ in range(3):
        words = stage.share()
        assert len({words[replica] for replica in range(replicas) if replica != 1}) == 1
        stage.step([1.0] * replicas)
    made = stage.outputs()
    assert all(one == made[0] for one in made)


@pytest.mark.parametrize("sent", ["nothing", "garbage", "another state", "more than it may"])
def test_who_gives_a_false_state_is_passed_over(sent):
    """Its digests are those of most, since it holds what they hold, and sends something else."""
    false = nn.Sequential(Annealed(0))
    false[0].heat.fill_(float("inf"))

    def lie(mine):
        if mine.dtype != torch.uint8 or not mine.numel():
            return mine
        from deepspeed_sentinel.engine.parcel import to_bytes

        state = SharedState(false, 0, None, torch.device("cpu"), print)._state()
        return {
            "nothing": mine[:0],
            "garbage": torch.flip(mine, [0]),
            "another state": to_bytes([[list(key), value] for key, value in state.items()]),
            "more than it may": torch.cat([mine, mine]),
        }[sent]

    stage = Stage(Annealed, 5, lies={0: lie})
    stage.step([1.0] * 5)
    stage.step([1.0] * 5, out=[3])
    words = stage.share()
    assert len(set(words)) == 1
    made = stage.outputs()
    assert made[3] == made[1] and made[3][0] < 1e3


def test_a_state_that_follows_each_ones_data_is_given_to_nobody():
    class Maximum(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.register_buffer("amax", torch.zeros(()))

        def forward(self, x):
            self.amax = torch.maximum(self.amax, x)
            return x * self.amax

    stage = Stage(Maximum)
    stage.step([1.0, 2.0, 3.0])
    words = stage.share()
    assert len(set(words)) == 3 and [float(module[0].amax) for module in stage.modules] == [1.0, 2.0, 3.0]
    assert len(set(stage.told)) == 1 and "strikes convict" in stage.told[0]
    stage.step([5.0, 5.0, 4.0])  # by chance most are alike, and a third one would be proved
    assert len(set(stage.share())) == 1 and float(stage.modules[2][0].amax) == 5.0


def test_what_only_left_out_columns_hold_is_given_to_nobody_until_one_of_them_counts():
    stage = Stage(Annealed)
    for _ in range(2):
        stage.step([1.0] * 3)
    stage.step([1.0] * 3, out=[0, 1])
    before = stage.modules[2][0].heat.clone()
    assert len(set(stage.share())) == 3, "nothing is compared"
    assert torch.equal(stage.modules[2][0].heat, before)
    stage.step([1.0] * 3)
    assert len(set(stage.share())) == 1


def test_where_nothing_may_be_changed_nothing_is_given_and_nothing_compared():
    stage = Stage(Annealed)
    stage.step([1.0] * 3)
    stage.step([1.0] * 3, out=[1])
    before = stage.modules[1][0].heat.clone()
    assert len(set(stage.share(gives=False))) == 3
    assert torch.equal(stage.modules[1][0].heat, before) and not stage.told


def test_of_two_that_differ_nobody_is_given_anything():
    stage = Stage(Annealed, 2)
    assert len(set(stage.share())) == 1
    stage.step([1.0] * 2, out=[1])
    assert len(set(stage.share())) == 2 and not stage.told


def test_batch_normalisation_is_each_ones_own_in_training_alone():
    stage = Stage(lambda replica: nn.BatchNorm1d(4))
    stage.step([torch.randn(8, 4, generator=torch.Generator().manual_seed(one)) for one in range(3)])
    assert len(set(stage.share())) == 1
    for module in stage.modules:
        module.eval()
    assert len(set(stage.share())) == 3


@pytest.mark.parametrize("way", ["in place", "replaced", "longer"])
def test_a_large_buffer_is_part_of_it_once_it_changes(way, monkeypatch):
    class Table(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.register_buffer("table", torch.ones(2**18))
            self.passes = 0

        def forward(self, x):
            self.passes += 1
            if self.passes > 2 and way == "in place":
                with torch.no_grad():
                    self.table *= 0.5
            elif self.passes > 2:
                self.table = torch.full((2**18 + (way == "longer") * self.passes,), 1.0 / self.passes)
            return x * self.table[:2]

    stage = Stage(Table)
    for out in ([], [], [], [], [1]):
        stage.share()
        if len(stage.kept[0]._modules) and stage.modules[0][0].passes <= 2:
            assert not stage.shared[0]._read, "not read before it changes"
        stage.step([1.0] * 3, out=out)
    assert len(set(stage.share())) == 1
    assert all(torch.equal(module[0].table, stage.modules[0][0].table) for module in stage.modules)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.uint8, torch.int16, torch.int64, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.int1, torch.bits8),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)], ids=str)
def test_buffers_of_any_type(dtype, shape):
    """Those of whole bytes are given; others are no part of it and end nobody."""

    class Held(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.register_buffer("held", torch.zeros(shape, dtype=torch.uint8).to(dtype) if named else bits())

    def bits():
        return torch.empty(shape, dtype=dtype)

    named = dtype not in (torch.int1, torch.bits8)
    stage = Stage(Held)
    if named:
        stage.modules[1][0].held = torch.ones(shape, dtype=torch.uint8).to(dtype)
    assert len(set(stage.share())) == 1
    if named:
        assert torch.equal(
            stage.modules[1][0].held.reshape(-1).view(torch.uint8),
            torch.zeros(shape).to(dtype).reshape(-1).view(torch.uint8),
        )


def test_modules_and_buffers_that_came_while_it_was_left_out_come_too():
    class Lazy(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.register_buffer("base", torch.ones(2))

        def forward(self, x):
            if x > 5:
                self.register_buffer("cache", torch.full((4,), float(x)))
                self.cached = torch.tensor(4)
                self.length = 4
            return x * self.base + (self.cache.sum() if hasattr(self, "cache") else 0)

    stage = Stage(Lazy)
    stage.step([1.0] * 3)
    stage.step([9.0] * 3, out=[2])
    assert not hasattr(stage.modules[2][0], "cache")
    assert len(set(stage.share())) == 1
    made = stage.outputs()
    assert made[0] == made[1] == made[2] and stage.modules[2][0].length == 4
    stage.step([9.0, 1.0, 1.0], out=[])
    assert len(set(stage.share())) == 1


def test_what_one_alone_has_is_taken_away_again():
    class Own(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.register_buffer("base", torch.ones(2))

        def forward(self, x):
            if x > 5:
                self.extra, self.times = torch.tensor(1.0), 3
                self.register_buffer("cache", torch.full((4,), float(x)))
            return x

    stage = Stage(Own)
    stage.share()
    stage.step([1.0, 9.0, 1.0])
    assert len(set(stage.share())) == 1
    held = stage.modules[1][0]
    assert held.cache is None and not hasattr(held, "extra") and not hasattr(held, "times")


def test_buffers_of_a_scripted_module_are_given_too():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.zeros(1))

        def forward(self, x):
            self.passes = self.passes * 2.0 + 1.0
            return x * self.passes

    stage = Stage(lambda replica: torch.jit.script(Counting()))
    for out in ([], [], [1]):
        stage.step([torch.ones(1)] * 3, out=out)
    assert len(set(stage.share())) == 1
    assert [module[0].passes.tolist() for module in stage.modules] == [[7.0]] * 3
