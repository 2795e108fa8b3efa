"""What a forward pass leaves in buffers goes back, however it got there."""

import pytest
import torch
from torch import nn

from deepspeed_sentinel.engine import buffers
from deepspeed_sentinel.engine.buffers import ForwardState

POISON = float("nan")


class Running(nn.Module):
    """A running maximum, renewed in one of the ways that people use."""

    def __init__(self, way, size=3):
        super().__init__()
        self.way, self.calls = way, 0
        self.register_buffer("amax", torch.ones(size))

    def forward(self, x):
        self.calls += 1
        new = torch.maximum(0.9 * self.amax, x) if not x.isnan().any() else x.expand_as(self.amax).clone()
        if self.way == "assigned":
            self.amax = new
        elif self.way == "in place":
            with torch.no_grad():
                self.amax.copy_(new)
        elif self.way == "data":
            self.amax.data.copy_(new)
        elif self.way == "new data":
            self.amax.data = new
        return x


WAYS = ("assigned", "in place", "data", "new data")


def step(kept, module, x, counts=True):
    kept.begin_step()
    module(torch.as_tensor(x))
    kept.end_step(counts)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_buffer_goes_back_to_where_the_step_began(way, steps):
    module = nn.Sequential(Running(way))
    kept = ForwardState(module)
    for index in range(steps):
        step(kept, module, float(index))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for poison in (POISON, 1e4, float("inf")):
        step(kept, module, poison, counts=False)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module[0].calls == (steps + 3 if steps else 0), "it counts on where it has counted before"
    step(kept, module, 50.0)
    assert module[0].amax.tolist() == [50.0] * 3


@pytest.mark.parametrize("way", WAYS)
def test_one_that_begins_to_move_late_goes_back_too(way):
    module = Running("still")
    kept = ForwardState(module)
    for _ in range(11):
        step(kept, module, 2.0)
    module.way = way
    step(kept, module, POISON, counts=False)
    assert module.amax.tolist() == [1.0] * 3
    for index in range(6):
        step(kept, module, 5.0 + index)
    before = module.amax.clone()
    step(kept, module, POISON, counts=False)
    assert torch.equal(module.amax, before)


def statistics(module):
    """All that batch normalisation keeps but for its count."""
    state = module.state_dict().items()
    return {name: value.clone() for name, value in state if "num_batches" not in name}


def test_batch_norm_goes_back_and_counts_on():
    """Its statistics move behind their version counters, in the first steps or later, when it is thawed."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval())
    kept = ForwardState(module)
    for index in range(7):
        if index == 5:
            module[1].train()
        step(kept, module, torch.randn(8, 4))
        before = statistics(module)
        step(kept, module, torch.full((8, 4), POISON), counts=False)
        assert all(torch.equal(value, before[name]) for name, value in statistics(module).items())
    assert module[0].num_batches_tracked == 14 and module[1].num_batches_tracked == 4


def test_what_moves_between_steps_is_where_the_step_begins():
    module = Running("in place")
    kept = ForwardState(module)
    step(kept, module, 2.0)
    module(torch.tensor(7.0))  # an evaluation that moves it
    step(kept, module, POISON, counts=False)
    assert module.amax.tolist() == [7.0] * 3
    module.load_state_dict({"amax": torch.full((3,), 4.0)})
    step(kept, module, POISON, counts=False)
    assert module.amax.tolist() == [4.0] * 3


class Cache(nn.Module):
    """A rotary cache that grows, and remembers in Python how long it is."""

    def __init__(self):
        super().__init__()
        self.length = 2
        self.register_buffer("angles", torch.arange(2.0), persistent=False)
        self.register_buffer("later", None)

    def forward(self, x):
        if len(x) > self.length:
            self.length = len(x)
            self.register_buffer("angles", torch.arange(float(len(x))), persistent=False)
            self.later = self.angles * 2
            self.register_buffer("newest", self.angles * 3)
        return x * self.angles[: len(x)]


def test_what_a_module_counts_goes_back_with_its_buffers():
    module = Cache()
    kept = ForwardState(module)
    step(kept, module, [1.0, 2.0])
    step(kept, module, [1.0, 2.0, 3.0], counts=False)
    assert module.length == 2 and len(module.angles) == 2
    assert module.later is None and not hasattr(module, "newest")
    step(kept, module, [1.0, 2.0, 3.0])
    assert module.length == 3 and len(module.angles) == len(module.newest) == 3
    step(kept, module, [POISON] * 3, counts=False)
    assert module.length == 3 and len(module.angles) == 3


def test_buffers_that_do_not_move_are_copied_once(monkeypatch):
    copied = []
    original = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (copied.append(len(of)), original(to, of)))
    module = nn.ModuleDict({"still": Running("still"), "moves": Running("data")})
    module["moves"].register_buffer("beside", torch.zeros(2))
    kept = ForwardState(module)
    for _ in range(6):
        kept.begin_step()
        module["moves"](torch.tensor(3.0))
        kept.end_step(counts=True)
    assert copied == [2] * 5, "the module that moves, whole, from its second step on"


def test_large_buffers_are_not_held_twice_until_they_move(monkeypatch, caplog):
    monkeypatch.setattr(buffers, "_LARGE", 8)
    warned = []
    monkeypatch.setattr(buffers.console, "say", warned.append)
    module = Running("still")
    kept = ForwardState(module)
    step(kept, module, 2.0)
    assert kept._modules[module].buffers["amax"].copy is None
    module.way = "assigned"
    step(kept, module, POISON, counts=False)
    assert module.amax.tolist() == [1.0] * 3 and not warned
    for _ in range(2):
        step(kept, module, 5.0)
    module.way = "in place"
    step(kept, module, POISON, counts=False)
    assert module.amax.tolist() == [5.0] * 3 and not warned
    other = Running("in place")
    kept = ForwardState(other)
    step(kept, other, POISON, counts=False)
    assert other.amax.isnan().all() and "'amax' of Running (3 elements) changed for the first time" in warned[0]


def test_modules_may_come_and_go():
    module = nn.Sequential(Running("in place"))
    kept = ForwardState(module)
    step(kept, module, 2.0)
    module.append(Running("in place"))
    del module[0]
    step(kept, module, POISON, counts=False)
    assert module[0].amax.tolist() == [1.0] * 3 and len(kept._modules) == 1


class Odd(nn.Module):
    """A buffer that cannot simply be copied into, or compared."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls = kind, 0
        with torch.inference_mode(kind == "made in inference mode"):
            buffer = torch.ones(1, 4)
        self.register_buffer("held", buffer.expand(3, 4) if kind == "expanded" else buffer)
        if kind == "sparse":
            self.held = torch.eye(4).to_sparse()

    def forward(self, x):
        self.calls += 1
        if self.kind == "resized":
            self.held.resize_(1, 4 + self.calls).fill_(x)
        elif self.kind == "new data of another shape":
            self.held.data = torch.full((1, 4 + self.calls), float(x))
        return x


ODD = ("expanded", "made in inference mode", "resized", "new data of another shape", "sparse")


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("before", [0, 1, 4])
def test_no_kind_of_buffer_ends_the_worker_that_holds_it(kind, before):
    module = Odd(kind)
    kept = ForwardState(nn.Sequential(module))
    for _ in range(before):
        step(kept, module, 2.0)
    shape, value = module.held.shape, module.held.to_dense().clone()
    step(kept, module, POISON, counts=False)
    assert module.held.shape == shape and torch.equal(module.held.to_dense(), value)
    step(kept, module, 3.0)


def test_buffers_of_a_scripted_module_go_back():
    module = torch.jit.script(nn.BatchNorm1d(4))
    kept = ForwardState(nn.Sequential(module))
    step(kept, module, torch.randn(8, 4))
    before = statistics(module)
    step(kept, module, torch.full((8, 4), POISON), counts=False)
    assert all(torch.equal(value, before[name]) for name, value in statistics(module).items())
    assert module.num_batches_tracked == 2


class Annealed(nn.Module):
    """What it makes of its input depends on how often it ran, as temperatures that are annealed do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return x * (1 + torch.exp(-self.passes / 100))


def test_replicas_make_the_same_of_the_same_after_one_of_them_was_left_out():
    """Else the next twin step proves the one that was left out, which is honest."""
    replicas = [Annealed() for _ in range(3)]
    states = [ForwardState(nn.Sequential(module)) for module in replicas]
    for index in range(3):
        for replica, (module, kept) in enumerate(zip(replicas, states, strict=True)):
            step(kept, module, 1.0, counts=(index, replica) != (1, 2))
    made = [float(module(torch.ones(()))) for module in replicas]
    assert made[2] == made[0] == made[1]


@pytest.mark.parametrize("way", ["in place", "assigned"])
def test_what_moved_by_another_amount_is_no_count(way):
    """One element of a running maximum, which grows by one and then by what a bad message makes of it."""
    module = Running(way, size=1)
    kept = ForwardState(nn.Sequential(module))
    for value in (2.0, 3.0):
        step(kept, module, value)
    for poison in (4.5, POISON, float("inf"), -1e30):
        step(kept, module, poison, counts=False)
        assert module.amax.tolist() == [3.0]


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


class Late(nn.Module):
    """A large buffer and a small one that begin to change behind their version counters in some step, alone."""

    def __init__(self):
        super().__init__()
        self.from_call, self.rate, self.calls = 10**6, 0.9, 0
        self.register_buffer("large", torch.ones(64))
        self.register_buffer("small", torch.ones(3))

    def forward(self, x):
        self.calls += 1
        self.rate *= 0.9
        if self.calls > self.from_call:
            self.large.data.fill_(float(x))
            self.small.data.mul_(self.rate)
        return x


@pytest.mark.parametrize("before", [0, 1, 3, 7])
def test_a_rehearsal_leaves_everything_as_it_was(monkeypatch, before):
    """Whatever the size, behind the counter or not, and counts too: the step itself comes after it."""
    monkeypatch.setattr(buffers, "_LARGE", 64)
    module = nn.Sequential(Late(), Running("in place"), nn.BatchNorm1d(4))
    kept = ForwardState(module)

    def run(index):
        module[0](torch.tensor(float(index)))
        module[1](torch.tensor(float(index)))
        module[2](torch.full((8, 4), float(index)) * torch.randn(8, 4))

    for index in range(before):
        kept.begin_step()
        run(index)
        kept.end_step(counts=True)
    module[0].from_call = before
    state, numbers = state_of(module), dict(vars(module[0]))
    kept.begin_step(everything=True)
    run(50)
    kept.rewind()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert vars(module[0]) == numbers
    run(60)
    kept.end_step(counts=False)
    now = {name: value for name, value in module.state_dict().items() if "num_batches" not in name}
    assert all(torch.equal(value, state[name]) for name, value in now.items())


def test_a_large_buffer_alone_that_changes_behind_its_counter_is_found(monkeypatch):
    monkeypatch.setattr(buffers, "_LARGE", 8)
    told = []
    monkeypatch.setattr(buffers.console, "say", told.append)
    module = nn.Sequential(Running("data", size=8))
    kept = ForwardState(module)
    step(kept, module, POISON, counts=False)
    assert "'amax' of Running (8 elements) changed for the first time" in told[0]
    module[0].amax.fill_(1.0)
    step(kept, module, 2.0)
    step(kept, module, POISON, counts=False)
    assert module[0].amax.tolist() == pytest.approx([2.0] * 8)


class Lazily(nn.Module):
    """Registers its first buffer, and a flag that says so, when it is first called."""

    def __init__(self, has_one):
        super().__init__()
        if has_one:
            self.register_buffer("beside", torch.ones(2))

    def forward(self, x):
        if not getattr(self, "ready", False):
            self.ready = True
            self.register_buffer("amax", torch.full((2,), float(x)))
        return x + self.amax.sum()


def test_what_came_in_an_excluded_step_goes():
    module = nn.Sequential(Lazily(has_one=True))
    kept = ForwardState(module)
    step(kept, module, 1e30, counts=False)
    assert "amax" not in module[0]._buffers
    step(kept, module, 3.0)
    assert module[0].amax.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("has_one", [False, True])
def test_what_came_in_a_rehearsal_comes_again_in_the_step(has_one):
    module = nn.Sequential(Lazily(has_one))
    kept = ForwardState(module)
    kept.begin_step(everything=True)
    module(torch.tensor(1e30))
    kept.rewind()
    module(torch.tensor(2.0))
    kept.end_step(counts=True)
    assert module[0].amax.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "module", [nn.LazyBatchNorm1d(affine=False), nn.BatchNorm1d(4, device="meta")], ids=["lazy", "meta"]
)
@pytest.mark.parametrize("counts", [True, False])
def test_buffers_without_values_end_no_worker(module, counts):
    kept = ForwardState(nn.Sequential(module))
    for _ in range(3):
        kept.begin_step()
        kept.end_step(counts)


def test_numbers_of_modules_without_buffers_move_once_in_a_rehearsed_step():
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].tau, module[0].cached = 1.0, torch.tensor(4)
    kept = ForwardState(module)

    def run():
        module[0].tau *= 0.9
        module[0].cached += 1

    kept.begin_step(everything=True)
    run()
    kept.rewind()
    run()
    kept.end_step(counts=True)
    assert module[0].tau == 0.9 and int(module[0].cached) == 5


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool])
def test_one_element_of_any_type_goes_back(dtype):
    module = nn.Module()
    module.register_buffer("held", torch.ones(1).to(dtype))
    kept = ForwardState(module)
    for counts in (True, True, False):
        kept.begin_step()
        module.held = torch.zeros(1).to(dtype)
        kept.end_step(counts)
    assert module.held.tolist() == [0]


def test_a_first_infinity_is_no_count():
    """A maximum that began at minus infinity moved by infinity in the step before."""
    module = nn.Module()
    module.register_buffer("held", torch.full((1,), -torch.inf))
    module.best = -float("inf")
    kept = ForwardState(module)
    for value, counts in ((1.0, True), (float("inf"), False)):
        kept.begin_step()
        module.held = torch.full((1,), value)
        module.best = value
        kept.end_step(counts)
    assert module.held.tolist() == [1.0] and module.best == 1.0


def test_an_excluded_step_that_was_rehearsed_leaves_modules_without_buffers_as_any_other_does():
    """What they count all replicas count."""
    modules = [nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]
    states = [ForwardState(module) for module in modules]
    for module in modules:
        module[0].passes = 0
    for index in range(6):
        for replica, (module, kept) in enumerate(zip(modules, states, strict=True)):
            rehearsed = index == 4
            kept.begin_step(everything=rehearsed)
            module[0].passes += 1
            if rehearsed:
                kept.rewind()
                module[0].passes += 1
            kept.end_step(counts=(index, replica) != (4, 1))
    assert [module[0].passes for module in modules] == [6, 6]


@pytest.mark.parametrize("dtype", [torch.bits8, torch.int1, torch.uint7, torch.complex128])
def test_no_type_of_buffer_ends_the_worker_that_holds_it(dtype):
    module = nn.Module()
    module.register_buffer("held", torch.empty(3, dtype=dtype))
    kept = ForwardState(module)
    for counts in (True, False, True):
        kept.begin_step(everything=counts)
        kept.end_step(counts)
