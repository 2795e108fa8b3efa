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
    kept.moved(thorough=False)
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
    assert module[0].calls == steps
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


def copies(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_batch_norm_goes_back():
    """Its statistics move behind their version counters, in the first steps or later, when it is thawed."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval())
    kept = ForwardState(module)
    for index in range(7):
        if index == 5:
            module[1].train()
        step(kept, module, torch.randn(8, 4))
        before = copies(module)
        step(kept, module, torch.full((8, 4), POISON), counts=False)
        assert all(torch.equal(value, before[name]) for name, value in copies(module).items())
    assert module[0].num_batches_tracked == 7 and module[1].num_batches_tracked == 2


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
        kept.moved(thorough=False)
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
    before = copies(module)
    step(kept, module, torch.full((8, 4), POISON), counts=False)
    assert all(torch.equal(value, before[name]) for name, value in copies(module).items())
    assert module.num_batches_tracked == 1
