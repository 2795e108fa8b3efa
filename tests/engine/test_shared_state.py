"""Replicas of a stage are brought into one state, and nobody's word for its state excuses it from being compared."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from deepspeed_sentinel.engine.buffers import ForwardState
from deepspeed_sentinel.engine.shared_state import UNSHARED, SharedState
from deepspeed_sentinel.engine.stage_state import StageState


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
        self.kept = [ForwardState(module) for module in self.modules]
        row, self.told, device = Row(replicas, lies), [], torch.device("cpu")
        self.shared = [
            SharedState(module, kept.first, replica, replicas, row.of(replica), device, self.told.append)
            for replica, (module, kept) in enumerate(zip(self.modules, self.kept, strict=True))
        ]

    def share(self, gives=True):
        words = [None] * len(self.shared)

        def run(replica):
            words[replica] = self.shared[replica].share(gives)

        threads = [threading.Thread(target=run, args=[replica]) for replica in range(len(self.shared))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert None not in words
        return words

    def shares(self):
        """Whether all are in one state now."""
        words = set(self.share())
        assert UNSHARED not in words or words == {UNSHARED}
        return len(words) == 1 and UNSHARED not in words

    def step(self, inputs, out=()):
        """A step on these inputs of the replicas, of which those ``out`` do not count."""
        for replica, (module, kept) in enumerate(zip(self.modules, self.kept, strict=True)):
            kept.begin_step()
            module(torch.as_tensor(inputs[replica]))
            kept.end_step(counts=replica not in out, all_count=not out)
        for shared in self.shared:
            shared.left_out(np.array([replica in out for replica in range(len(self.modules))]))

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
        assert stage.shares()
        stage.step([1.0, 1.0, 1.0])
    assert not stage.shared[0].due
    stage.step([1.0, float("nan"), 1.0], out=[1])
    assert stage.shared[0].due and stage.shares() and not stage.shared[0].due
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
        assert UNSHARED not in words
        stage.step([1.0] * replicas)
    made = stage.outputs()
    assert all(one == made[0] for one in made)


def garbage(mine):
    return torch.flip(mine, [0]) if mine.dtype == torch.uint8 and mine.numel() > 20 else mine


def nothing(mine):
    return mine[:0] if mine.dtype == torch.uint8 and mine.numel() > 20 else mine


def bits_of_another_state(mine):
    """The list is right, and what was asked for is not."""
    return torch.full_like(mine, 127) if mine.dtype == torch.uint8 and 20 < mine.numel() < 500 else mine


@pytest.mark.parametrize("lie", [garbage, nothing, bits_of_another_state])
def test_who_gives_a_false_state_is_passed_over(lie):
    """Its digests are those of most, since it holds what they hold, and sends something else."""
    stage = Stage(Annealed, 5, lies={0: lie})
    stage.step([1.0] * 5)
    stage.step([1.0] * 5, out=[3])
    assert stage.shares()
    made = stage.outputs()
    assert made[3] == made[1] and made[3][0] < 1e3


class Maximum(nn.Module):
    def __init__(self, replica):
        super().__init__()
        self.register_buffer("amax", torch.zeros(()))

    def forward(self, x):
        self.amax = torch.maximum(self.amax, x)
        return x * self.amax


def test_a_state_that_follows_each_ones_data_is_given_to_nobody():
    stage = Stage(Maximum)
    stage.step([1.0, 2.0, 3.0])
    assert set(stage.share()) == {UNSHARED} and [float(one[0].amax) for one in stage.modules] == [1.0, 2.0, 3.0]
    assert len(set(stage.told)) == 1 and "strikes convict" in stage.told[0]
    stage.step([5.0, 5.0, 4.0])  # by chance most are alike, and a third one would be proved
    assert stage.shares() and float(stage.modules[2][0].amax) == 5.0


@pytest.mark.parametrize(
    ("replicas", "out", "blind"), [(3, [0, 1], 2), (4, [0, 1], 0), (5, [0, 1], 0), (5, [0, 1, 2], 2)]
)
def test_those_that_counted_say_what_it_is(replicas, out, blind):
    """Where no more of them are left than may be bad, nothing is compared until others have counted."""
    stage = Stage(Annealed, replicas)
    for _ in range(2):
        stage.step([1.0] * replicas)
    stage.step([1.0] * replicas, out=out)
    before, shared = stage.modules[-1][0].heat.clone(), []
    for _ in range(4):
        shared.append(stage.shares())
        stage.step([1.0] * replicas)
    assert shared == [False] * (blind // 2) + [True] * (4 - blind // 2)
    if not blind:
        assert torch.equal(stage.modules[0][0].heat, before * 0.9**4), "what had counted is what is right"


def take_after(bad, stale):
    """A bad worker's state becomes that of one that was left out."""
    bad.heat, bad.history = stale.heat.clone(), None if stale.history is None else stale.history.clone()
    bad.tau, bad.longest, bad.seen = stale.tau, stale.longest, stale.seen.clone()


def test_nobody_is_given_a_stale_state_by_a_bad_worker_that_says_it_is_his():
    stage = Stage(Annealed)
    stage.step([1.0] * 3)
    for _ in range(3):
        stage.step([1.0] * 3, out=[1])
        heat = stage.modules[2][0].heat.clone()
        take_after(stage.modules[0][0], stage.modules[1][0])
        assert not stage.shares() and torch.equal(stage.modules[2][0].heat, heat)


def test_where_nothing_may_be_changed_nothing_is_given_and_nothing_compared():
    stage = Stage(Annealed)
    stage.step([1.0] * 3)
    stage.step([1.0] * 3, out=[1])
    before = stage.modules[1][0].heat.clone()
    assert set(stage.share(gives=False)) == {UNSHARED}
    assert torch.equal(stage.modules[1][0].heat, before) and not stage.told


def test_of_two_that_differ_nobody_is_given_anything():
    stage = Stage(Annealed, 2)
    assert stage.shares()
    stage.step([1.0] * 2, out=[1])
    assert set(stage.share()) == {UNSHARED} and not stage.told


def test_batch_normalisation_is_each_ones_own_in_training_alone():
    stage = Stage(lambda replica: nn.BatchNorm1d(4))
    stage.step([torch.randn(8, 4, generator=torch.Generator().manual_seed(one)) for one in range(3)])
    assert stage.shares()
    for module in stage.modules:
        module.eval()
    assert not stage.shares()


class Table(nn.Module):
    """A large buffer that a long message changes, in one of the ways that people use."""

    def __init__(self, way):
        super().__init__()
        self.way, self.length = way, 2**17
        self.register_buffer("table", torch.ones(self.length))

    def forward(self, x):
        if x > 5 and self.way == "in place":
            with torch.no_grad():
                self.table *= 0.5
        elif x > 5:
            self.length = {"longer": 2**18, "shorter": 2**10, "another": 2**17}[self.way]
            self.table = torch.full((self.length,), 0.5)
        return x * self.table.sum()


@pytest.mark.parametrize("way", ["in place", "longer", "shorter", "another"])
@pytest.mark.parametrize("long", [[1], [0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("out", [[], [1]], ids=["none out", "one out"])
def test_large_buffers_are_given_whoever_changed_them(way, long, out):
    stage = Stage(lambda replica: Table(way))
    assert stage.shares()
    stage.step([9.0 if replica in long else 1.0 for replica in range(3)], out=out)
    assert stage.shares()
    made = stage.outputs()
    assert made[0] == made[1] == made[2]


def test_a_large_buffer_is_read_once_for_each_version(monkeypatch):
    stage, read = Stage(lambda replica: Table("in place")), []
    digest = StageState._once

    def noted(self, known, key, tensor, function):
        return digest(self, known, key, tensor, lambda large: read.append(large.numel()) or function(large))

    monkeypatch.setattr(StageState, "_once", noted)
    for message in (1.0, 1.0, 9.0, 1.0):
        stage.share()
        stage.step([message] * 3)
    assert read == [2**17] * 6, "of three replicas two versions"


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_a_tensor_without_elements_is_given_too(kind):
    stage = Stage(Annealed)
    stage.share()
    stage.step([1.0] * 3)
    for replica in (0, 2):
        module = stage.modules[replica][0]
        empty = torch.empty(0, 3)
        module.register_buffer("recent", empty) if kind == "buffer" else setattr(module, "recent", empty)
    assert stage.shares()
    assert stage.modules[1][0].recent.shape == (0, 3) and len(stage.told) == 1


class Turning(nn.Module):
    """A number that becomes a tensor, or the other way round, or goes; two names of one tensor."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.register_buffer("base", torch.ones(2))
        self.register_buffer("again", self.base, persistent=False)
        self.longest = torch.tensor(7) if way == "to a number" else None if way == "from None" else 7

    def forward(self, x):
        if x > 5:
            self.longest = 9 if self.way == "to a number" else torch.tensor(9)
            if self.way == "goes":
                del self.longest
            if self.way == "one of two names":
                self.base = 2 * self.base
            elif self.way == "both names":
                with torch.no_grad():
                    self.base *= 2
        return x * self.base.sum() + 3 * self.again.sum() + int(getattr(self, "longest", None) or 0)


WAYS = ("to a tensor", "to a number", "from None", "goes", "one of two names", "both names")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("long", [[1], [0, 2]], ids=str)
def test_what_becomes_of_another_kind_is_given_too(way, long):
    """As the longest length of transformers' dynamic rotary embedding, which begins as a number."""
    stage = Stage(lambda replica: Turning(way))
    stage.step([9.0 if replica in long else 1.0 for replica in range(3)])
    assert stage.shares()
    made = stage.outputs()
    assert made[0] == made[1] == made[2]
    kinds = {type(getattr(module[0], "longest", "gone")) for module in stage.modules}
    assert len(kinds) == 1


@pytest.mark.parametrize("long", [[1], [0, 2]], ids=str)
def test_a_dynamic_rotary_embedding_of_transformers(long):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )

    class Rotary(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.rotary = LlamaRotaryEmbedding(config)

        def forward(self, x):
            positions = torch.arange(int(x))[None]
            return torch.stack([one.sum() for one in self.rotary(torch.zeros(1, len(positions[0]), 16), positions)])

    stage = Stage(Rotary)
    for round in range(3):
        stage.step([20 + round if replica in long else 4 for replica in range(3)])
        assert stage.shares()
        made = stage.outputs(10)
        assert made[0] == made[1] == made[2]


def test_a_parameter_that_a_buffer_is_a_view_of_is_left_alone():
    class View(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("seen", self.weight.detach()[:2] if replica != 1 else torch.zeros(2))
            if replica == 1:
                self.seen = self.weight.detach()[:2]
                self.weight.data = self.weight.data * 1.0

    stage = Stage(View)
    with torch.no_grad():
        stage.modules[1][0].seen.mul_(3.0)
        weight = stage.modules[1][0].weight.clone()
    assert stage.shares() and torch.equal(stage.modules[1][0].weight, weight)


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
    given = dtype not in (torch.int1, torch.bits8)

    class Held(nn.Module):
        def __init__(self, replica):
            super().__init__()
            zeros = torch.zeros(shape, dtype=torch.uint8).to(dtype) if given else torch.empty(shape, dtype=dtype)
            self.register_buffer("held", zeros)

    def bits(tensor):
        return tensor.reshape(-1).view(torch.uint8).tolist()

    stage = Stage(Held)
    if given:
        stage.modules[1][0].held = torch.ones(shape, dtype=torch.uint8).to(dtype)
    assert stage.shares()
    if given:
        assert bits(stage.modules[1][0].held) == bits(stage.modules[0][0].held)
        assert stage.modules[1][0].held.shape == shape and stage.modules[1][0].held.dtype == dtype


class Lazy(nn.Module):
    def __init__(self, replica):
        super().__init__()
        self.register_buffer("base", torch.ones(2))

    def forward(self, x):
        if x > 5:
            self.register_buffer("cache", torch.full((4,), float(x)))
            self.cached, self.length = torch.tensor(4), 4
        return x * self.base + (self.cache.sum() if getattr(self, "cache", None) is not None else 0)


def test_what_came_while_it_was_left_out_comes_too():
    stage = Stage(Lazy)
    stage.step([1.0] * 3)
    stage.step([9.0] * 3, out=[2])
    assert not hasattr(stage.modules[2][0], "cache")
    assert stage.shares()
    made = stage.outputs()
    assert made[0] == made[1] == made[2] and stage.modules[2][0].length == 4


def test_what_one_alone_has_is_taken_away_again():
    stage = Stage(Lazy)
    stage.share()
    stage.step([1.0, 9.0, 1.0])
    assert stage.shares()
    held = stage.modules[1][0]
    assert not hasattr(held, "cache") and not hasattr(held, "cached") and not hasattr(held, "length")
    made = stage.outputs()
    assert made[0] == made[1]
    stage.outputs(9.0)


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
    assert stage.shares()
    assert [module[0].passes.tolist() for module in stage.modules] == [[7.0]] * 3


class Parts(nn.Module):
    """A tensor that a module and its part both hold, and a view of it."""

    def __init__(self, replica):
        super().__init__()
        self.register_buffer("heat", torch.ones(4))
        self.register_buffer("beginning", self.heat[:2])
        self.part = nn.Module()
        self.part.register_buffer("heat", self.heat, persistent=False)

    def forward(self, x):
        self.heat.mul_(0.9)
        return x * self.heat.sum() + self.beginning.sum() + self.part.heat.sum()


def test_what_is_made_of_one_tensor_stays_so():
    stage = Stage(Parts)
    for out in ([], [1], []):
        stage.step([1.0] * 3, out=out)
        assert stage.shares()
    made = stage.outputs()
    assert made[0] == made[1] == made[2]
    for module in stage.modules:
        assert module[0].heat is module[0].part.heat and module[0].beginning.data_ptr() == module[0].heat.data_ptr()
    states = [sorted(module.state_dict()) for module in stage.modules]
    assert states[0] == states[1] == ["0.beginning", "0.heat"]


def test_what_a_new_buffer_is_saved_as_comes_with_it():
    class Cached(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.register_buffer("base", torch.ones(2))

        def forward(self, x):
            self.register_buffer("cache", torch.full((4,), float(x)), persistent=False)
            return x

    stage = Stage(Cached)
    stage.modules[1][0].register_buffer("cache", torch.ones(4))
    stage.step([2.0] * 3, out=[1])
    assert stage.shares()
    assert [sorted(module.state_dict()) for module in stage.modules] == [["0.base"]] * 3


def test_a_text_is_part_of_it():
    class Phases(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.register_buffer("base", torch.ones(2))
            self.phase, self.where = "warm", None

        def forward(self, x):
            self.phase, self.where = "lazy", f"cuda:{id(self)}"[:6]
            return x * (1 if self.phase == "warm" else 2)

    stage = Stage(Phases)
    stage.step([1.0] * 3, out=[1])
    assert stage.shares() and stage.modules[1][0].phase == "lazy"


def test_a_module_that_keeps_a_table_as_a_plain_tensor_keeps_its_length():
    """As the rotary embedding of transformers' Wav2Vec2-BERT; lengths that do not fit their table end a worker."""

    class Cached(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.register_buffer("frequencies", torch.ones(2))
            self.length, self.table = None, None

        def forward(self, x):
            if self.length != int(x):
                self.length, self.table = int(x), torch.arange(int(x)).float()
            return torch.ones(int(x)) * self.table

    stage = Stage(Cached)
    for inputs, out in (([5, 8, 8], []), ([8, 5, 8], [1]), ([8, 8, 8], []), ([5, 5, 5], [0]), ([8, 5, 5], [])):
        stage.step(inputs, out=out)
        assert stage.shares()


class OlderRotary(nn.Module):
    """As in transformers 4: what it began with is a plain attribute, the very tensor that is the buffer then."""

    def __init__(self, replica):
        super().__init__()
        self.register_buffer("frequencies", torch.ones(3), persistent=False)
        self.original, self.longest = self.frequencies, 8

    def forward(self, x):
        if x > self.longest:
            self.register_buffer("frequencies", torch.full((3,), 1.0 / float(x)), persistent=False)
            self.longest = int(x)
        elif x < 6 and self.longest > 8:
            self.register_buffer("frequencies", self.original, persistent=False)
            self.longest = 8
        return x * self.frequencies


@pytest.mark.parametrize("inputs", [[1.0, 20.0, 1.0], [20.0, 1.0, 20.0], [20.0, 20.0, 20.0]], ids=str)
@pytest.mark.parametrize("out", [[], [1]], ids=["none out", "one out"])
def test_what_a_buffer_was_made_of_is_not_written_over(inputs, out):
    stage = Stage(OlderRotary)
    stage.step(inputs, out=out)
    assert stage.shares()
    for x in (7.0, 15.0, 4.0, 30.0, 4.0):
        made = stage.outputs(x)
        assert made[0] == made[1] == made[2], x
    assert all(module[0].original.tolist() == [1.0] * 3 for module in stage.modules)


def test_tensors_of_a_size_that_follows_the_data_hide_no_number():
    class Reporting(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.register_buffer("base", torch.ones(3))
            self.temperature, self.dead = 2.0, None

        def forward(self, x):
            self.temperature *= 0.9
            self.dead = torch.zeros(int(x))
            return x * self.base * self.temperature

    stage = Stage(Reporting)
    for inputs in ([3, 1, 3], [3, 0, 3], [1, 3, 1], [2, 2, 2]):
        stage.step(inputs)
        assert stage.shares()
        assert len({module[0].temperature for module in stage.modules}) == 1 != stage.modules[0][0].temperature / 2.0


def test_how_a_tensor_lies_is_part_of_it():
    class Basis(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.register_buffer("basis", torch.ones(2, 2))

        def forward(self, x):
            self.basis = torch.arange(6.0).reshape(2, 3).T if x > 1 else torch.arange(6.0).reshape(3, 2)
            return x

    stage = Stage(Basis)
    stage.step([2.0] * 3, out=[1])
    assert stage.shares()
    assert {module[0].basis.stride() for module in stage.modules} == {(1, 3)}
    assert all(torch.equal(module[0].basis, torch.arange(6.0).reshape(2, 3).T) for module in stage.modules)


def test_an_attribute_that_was_there_from_the_beginning_is_never_taken_away():
    """On one replica it was a tensor by then, on the others a number that has not moved since."""

    class Grown(nn.Module):
        def __init__(self, replica):
            super().__init__()
            self.register_buffer("base", torch.ones(2))
            self.longest = torch.tensor(40) if replica == 0 else 16

        def forward(self, x):
            return x * self.base * int(self.longest)

    stage = Stage(Grown)
    stage.share()
    stage.outputs()
    assert int(stage.modules[0][0].longest) == 40


def test_hooks_of_one_replica_stay():
    stage, called = Stage(Annealed), []
    stage.modules[0][0].register_full_backward_hook(lambda *_: called.append(1))
    stage.step([1.0] * 3, out=[0])
    assert stage.shares()
    stage.modules[0](torch.ones(3, requires_grad=True)).sum().backward()
    assert called == [1]


@pytest.mark.parametrize("kind", ["wrapper", "lazy", "sparse"])
def test_parameters_that_lie_nowhere_end_nobody(kind):
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (2, 2))

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return args[0] if "detach" in str(function) else torch.zeros(2, 2)

    class Held(Annealed):
        def __init__(self, replica):
            super().__init__(replica)
            if kind == "lazy":
                self.linear = nn.LazyLinear(2)
            else:
                made = Wrapper() if kind == "wrapper" else torch.eye(2).to_sparse()
                self.weight = nn.Parameter(made, requires_grad=False)

    stage = Stage(Held)
    stage.step([1.0] * 3, out=[1])
    assert stage.shares()


def test_who_was_left_out_once_more_does_not_make_a_stale_state_count():
    """A bad worker says something of its own while another is left out, and then what that one has."""
    says = {"own": 1}
    stage = Stage(Annealed, lies={0: lambda mine: mine + says["own"] if mine.dtype == torch.int64 else mine})
    for _ in range(3):
        stage.step([1.0] * 3, out=[1])
        assert set(stage.share()[1:]) == {UNSHARED}
    stage.step([1.0] * 3, out=[2])
    says["own"] = 0
    for _ in range(3):
        take_after(stage.modules[0][0], stage.modules[1][0])
        heat = stage.modules[2][0].heat.clone()
        assert not stage.shares() and torch.equal(stage.modules[2][0].heat, heat)
        stage.step([1.0] * 3)
