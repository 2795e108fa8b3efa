"""What first and last stage hand over in a twin step, with all their ranks as threads of this process."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import backends

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine import packed
from deepspeed_sentinel.engine import twins as module
from deepspeed_sentinel.engine.ahead import copied
from deepspeed_sentinel.engine.parcel import most_bytes
from deepspeed_sentinel.engine.twins import TwinSteps
from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.mesh import Mesh, Worker

M, SECONDS = 3, 10
EVERY = {"enabled": True, "seed": 3, "twins": {"every": 1}}


class Row:
    """The words of one stage's replicas."""

    def __init__(self, replicas):
        self.said, self.barrier = [None] * replicas, threading.Barrier(replicas, timeout=SECONDS)

    def all_say(self, replica, mine):
        self.said[replica] = mine
        self.barrier.wait()
        said = list(self.said)
        self.barrier.wait()
        return said


class Words:
    """Control, for one rank of the first or the last stage."""

    def __init__(self, row, replica, sends, receives):
        self._row, self._replica, self._sends, self._receives = row, replica, sends, receives
        self.sent_bytes = 0

    def of_row(self, mine):
        return torch.stack(self._row.all_say(self._replica, mine))

    def of_replica(self, mine, replica, most):
        if mine.numel() > most:
            self._row.barrier.abort()
            raise SentinelError(f"more than {most}")
        self.sent_bytes = max(self.sent_bytes, mine.numel())
        return self._row.all_say(self._replica, mine)[replica]

    def swap_ends(self, mine):
        self._sends.put(mine)
        return self._receives.get(timeout=SECONDS)


class World:
    """``loaders(stage, replica)``: what that rank's engine draws its micro-batches from."""

    def __init__(self, loaders, replicas=3, config=EVERY, dynamic=False, loss_fn=None):
        mesh, self.twins, self.controls = Mesh(2, replicas), {}, {}
        rows = [Row(replicas) for _ in range(2)]
        lines = [(queue.Queue(), queue.Queue()) for _ in range(replicas)]
        self.engines = {}

        def create(stage, replica):
            there, back = lines[replica]
            control = Words(rows[stage], replica, *((there, back) if stage == 0 else (back, there)))
            engine = SimpleNamespace(
                micro_batches=M,
                dynamic_shape=dynamic,
                device="cpu",
                module=SimpleNamespace(loss_fn=loss_fn),
                data_iterator=iter(loaders(stage, replica)),
            )
            self.controls[stage, replica], self.engines[stage, replica] = control, engine
            self.twins[stage, replica] = TwinSteps(
                engine,
                mesh,
                Worker(stage, replica),
                control,
                SentinelConfig.parse(config),
                lambda: next(engine.data_iterator),
            )

        self.places = [(stage, replica) for stage in range(2) for replica in range(replicas)]
        self.everywhere(create)

    def everywhere(self, function):
        """{(stage, replica): what it returned}, all at once."""
        results = {}

        def run(place):
            try:
                results[place] = function(*place)
            except BaseException as error:
                results[place] = error

        threads = [threading.Thread(target=run, args=[place], daemon=True) for place in self.places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * SECONDS)
        for place in self.places:
            if isinstance(results[place], BaseException):
                raise results[place]
        return results

    def step(self, step=0):
        """What each rank is given: a list of micro-batches, then the StopIteration if there was one."""

        def one_by_one(*place):
            twins = self.twins[place]
            twins.begin_step(step, suspicion=False)
            given = []
            for _ in range(M):
                try:
                    given.append(twins.next_batch())
                except StopIteration as end:
                    given.append(end)
                    break
            return given

        return self.everywhere(one_by_one)

    def word(self, *place):
        return self.twins[place].word

    @property
    def source(self):
        return next(replica for stage, replica in self.places if stage == 0 and self.word(0, replica) == module._SOURCE)


def numbered(replica, index, shape=(2, 4), dtype=torch.int64):
    return torch.full(shape, 1000 * replica + index, dtype=dtype)


def whole(stage, replica):
    """Both stages' loaders yield inputs and labels."""
    return [(numbered(replica, index), numbered(replica, index)) for index in range(100)]


def apart(stage, replica):
    """Each stage's loader yields what it needs."""
    return [
        (numbered(replica, index), None) if stage == 0 else (None, numbered(replica, index)) for index in range(100)
    ]


def number(batch, stage):
    return int(batch[0 if stage == 0 else 1].flatten()[0])


@pytest.mark.parametrize("loaders", [whole, apart])
def test_all_columns_are_given_the_sources_and_every_loader_moves_on_as_always(loaders):
    world = World(loaders)
    for step in range(4):
        given = world.step(step)
        for (stage, _), batches in given.items():
            assert [number(batch, stage) for batch in batches] == [1000 * world.source + M * step + i for i in range(M)]


def test_fewer_columns_leave_the_others_their_own():
    world = World(whole, replicas=4, config={**EVERY, "twins": {"every": 1, "columns": 3}})
    given = world.step()
    words = [world.word(0, replica) for replica in range(4)]
    assert sorted(words) == [module._APART, module._GIVEN, module._GIVEN, module._SOURCE]
    for (stage, replica), batches in given.items():
        of = replica if words[replica] == module._APART else world.source
        assert [number(batch, stage) for batch in batches] == [1000 * of + i for i in range(M)]


def test_what_a_loader_yields_keeps_its_types_and_bits():
    def loaders(stage, replica):
        def batch(index):
            one = numbered(replica, index)
            inputs = [
                one,
                one > 5,
                one.int(),
                (one / 7).bfloat16(),
                one.t(),
                one[:, :1].expand(2, 4),
                torch.empty(0),
                one.sum(),
            ]
            labels = {"labels": one, "more": [one, (one, [one.bool()])], "lengths": [replica, 2.5, "text", None, True]}
            return [inputs, labels]

        return [batch(index) for index in range(M)]

    world = World(loaders)
    given = world.step()
    for (stage, _), batches in given.items():
        for index, batch in enumerate(batches):
            mine, expected = batch[stage], loaders(stage, world.source)[index][stage]
            assert same(mine, expected)


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_row_of_a_large_tensor_does_not_drag_the_tensor_along():
    large = torch.arange(10**6).reshape(-1, 4)
    world = World(lambda stage, replica: [(large[i : i + 2], large[i : i + 2]) for i in range(M)])
    world.step()
    assert max(control.sent_bytes for control in world.controls.values()) < 10_000


def test_what_the_batch_is_given_in_survives():
    """Three parts, or one where no other is needed."""
    third = torch.ones(1)
    world = World(lambda stage, replica: [(*batch, third) for batch in whole(stage, replica)])
    assert all(torch.equal(batch[2], third) for batches in world.step().values() for batch in batches)
    world = World(
        lambda stage, replica: [(numbered(replica, 0),) if stage == 0 else batch for batch in whole(1, replica)]
    )
    assert all(len(batch) == 1 for batch in world.step()[0, 0])


ENDED = [
    pytest.param([(0, 1), (1, 1)], id="one replica"),
    pytest.param([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)], id="all"),
    pytest.param([(1, 1)], id="last stage alone"),
    pytest.param([(0, 2)], id="first stage alone"),
]


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("ended", ENDED)
def test_a_loader_that_ends_does_so_where_it_would_and_nothing_is_lost(ended, left, caplog):
    world = World(lambda stage, replica: whole(stage, replica)[: M + left if (stage, replica) in ended else None])
    world.step(0)
    assert world.word(0, world.source) == module._SOURCE
    given = world.step(1)
    for (stage, replica), batches in given.items():
        assert world.word(stage, replica) == module._NONE
        last = M + left if (stage, replica) in ended else 2 * M
        drawn = [batch for batch in batches if not isinstance(batch, StopIteration)]
        assert [number(batch, stage) for batch in drawn] == [1000 * replica + i for i in range(M, last)]
        assert isinstance(batches[-1], StopIteration) == ((stage, replica) in ended)
    assert not any("could not be made" in record.message for record in caplog.records)


def test_an_error_of_a_loader_comes_where_it_would_and_nobody_waits():
    def broken(stage, replica):
        yield from whole(stage, replica)[:1]
        if (stage, replica) == (0, 1):
            raise OSError("the disk is gone")
        yield from whole(stage, replica)[1:]

    world = World(broken)

    def train(*place):
        twins = world.twins[place]
        twins.begin_step(0, suspicion=False)
        try:
            return [number(twins.next_batch(), place[0]) for _ in range(M)]
        except OSError as error:
            return [str(error)]

    given = world.everywhere(train)
    assert given.pop((0, 1)) == ["the disk is gone"]
    assert all(batches == [1000 * replica + i for i in range(M)] for (_, replica), batches in given.items())


def test_an_end_is_forgotten_with_the_loader_that_ended():
    world = World(lambda stage, replica: whole(stage, replica)[:1])
    world.everywhere(lambda *place: world.twins[place].begin_step(0, suspicion=False))
    for (stage, replica), engine in world.engines.items():  # as eval_batch does
        engine.data_iterator = iter(whole(stage, replica + 5))
    drawn = world.everywhere(lambda *place: number(world.twins[place].next_batch(), place[0]))
    assert all(found == 1000 * (replica + 5) for (_, replica), found in drawn.items())
    for (stage, _), batches in world.step(1).items():
        assert [number(batch, stage) for batch in batches] == [1000 * (world.source + 5) + 1 + i for i in range(M)]


def warned(monkeypatch):
    said = []
    monkeypatch.setattr(module.console, "say", said.append)
    return said


def test_other_shapes_make_no_twin_step_and_that_is_said(monkeypatch):
    said = warned(monkeypatch)
    world = World(lambda stage, replica: [2 * (numbered(replica, i, (2, 4 + replica)),) for i in range(100)])
    for step in range(12):
        given = world.step(step)
        assert all(world.word(*place) == module._REFUSED for place in world.places)
        assert all(number(batch, s) // 1000 == r for (s, r), batches in given.items() for batch in batches)
    assert [text.split(" twin steps")[0] for text in said] == ["1 of 1", "10 of 10"]
    assert "shapes" in said[0] and "fixed length" in said[0]


def test_labels_may_have_other_shapes_since_they_cross_no_link():
    def loaders(stage, replica):
        return [(one, numbered(replica, i, (3 + replica, 4))) for i, (one, _) in enumerate(whole(stage, replica))]

    world = World(loaders)
    for (stage, _), batches in world.step().items():
        expected = loaders(stage, world.source)
        assert all(same(batch[stage], other[stage]) for batch, other in zip(batches, expected, strict=False))
        assert len(batches) == M


def test_how_many_tensors_labels_are_counts_at_the_other_end(monkeypatch):
    """A loss may go by what its own replica's labels are."""
    said = warned(monkeypatch)
    world = World(lambda stage, replica: [(numbered(0, i), [numbered(0, i)] * (1 + replica)) for i in range(M)])
    world.step()
    assert all(world.word(*place) == module._REFUSED for place in world.places)
    assert len(said) == 1 and "how many tensors" in said[0]


def test_shapes_of_what_a_stage_does_not_use_do_not_count():
    def loaders(stage, replica):
        unused = numbered(0, 0, (2, 4 + replica))
        return [(one, unused) if stage == 0 else (unused, one) for one, _ in whole(stage, replica)]

    world = World(loaders)
    for (stage, _), batches in world.step().items():
        assert [number(batch, stage) for batch in batches] == [1000 * world.source + i for i in range(M)]


def test_where_messages_are_announced_shapes_and_masks_may_differ_but_no_data_types(monkeypatch):
    def mixed(stage, replica):
        made = [numbered(replica, i, (2, 3 + (replica + i) % 4)) for i in range(M)]
        return [((one, one > 0) if (i + replica) % 2 else (one,), one) for i, one in enumerate(made)]

    world = World(mixed, dynamic=True)
    for (stage, _), batches in world.step().items():
        for batch, expected in zip(batches, mixed(stage, world.source), strict=True):
            assert same(batch[stage], expected[stage])
    said = warned(monkeypatch)
    kinds = [torch.int64, torch.int32, torch.int64]
    world = World(lambda stage, r: [2 * (numbered(r, i, dtype=kinds[r]),) for i in range(M)], dynamic=True)
    world.step()
    assert all(world.word(*place) == module._REFUSED for place in world.places)
    assert len(said) == 1 and "data types" in said[0]


@pytest.mark.parametrize("held", [OrderedDict(labels=torch.ones(1)), {"labels": [torch.ones(1), {4}]}])
def test_what_cannot_be_handed_over_makes_no_twin_step_and_that_is_said(monkeypatch, held):
    said = warned(monkeypatch)
    world = World(lambda stage, replica: [(numbered(replica, i), held) for i in range(M)])
    given = world.step()
    assert all(str(batch[1]) == str(held) for (stage, _), batches in given.items() for batch in batches)
    assert len(said) == 1 and "tuples, lists and dicts" in said[0]


class Batch:
    """All that plain DeepSpeed asks of one: [0] and [1]."""

    def __init__(self, inputs, labels):
        self._parts = {0: inputs, 1: labels}

    def __getitem__(self, index):
        return self._parts[index]


def test_a_micro_batch_may_know_no_more_than_its_two_parts():
    world = World(lambda stage, replica: [Batch(*batch) for batch in whole(stage, replica)])
    for (stage, _), batches in world.step().items():
        assert [number(batch, stage) for batch in batches] == [1000 * world.source + i for i in range(M)]


def test_more_text_than_is_taken_makes_no_twin_step_and_that_is_said(monkeypatch):
    said = warned(monkeypatch)
    for size, word in ((4000, module._GIVEN), (6000, module._REFUSED)):
        monkeypatch.setattr(packed, "MOST_TEXT", 5000 * M)
        world = World(lambda stage, r, size=size: [(numbered(r, i), ["x" * size]) for i in range(M)])
        world.step()
        words = {world.word(*place) for place in world.places}
        assert word in words
    assert words == {module._REFUSED} and len(said) == 1 and "text" in said[0]


def nested(depth):
    return [nested(depth - 1)] if depth else 7


def test_what_is_nested_too_deeply_makes_no_twin_step():
    for depth in (200, 500, 900):
        world = World(
            lambda stage, r, depth=depth: [(one, nested(depth if r == 1 else 3)) for one, _ in whole(stage, r)]
        )
        world.step()
        assert {world.word(*place) for place in world.places} == {module._REFUSED}


def test_the_loss_is_asked_what_to_make_of_the_sources_labels():
    class Loss:
        def in_twin_step(self, labels, replicas):
            return [(one, replicas, len(labels)) for one in labels]

    world = World(whole, replicas=4, config={**EVERY, "twins": {"every": 1, "columns": 3}}, loss_fn=Loss())
    for (stage, replica), batches in world.step().items():
        own = world.word(stage, replica) == module._APART
        for index, batch in enumerate(batches):
            if stage == 0 or own:
                assert isinstance(batch[stage], torch.Tensor)
            else:
                labels, replicas, count = batch[1]
                assert int(labels[0, 0]) == 1000 * world.source + index and (replicas, count) == (4, M)


def test_a_refused_twin_step_is_told_by_most_of_both_ends_and_is_none():
    words = np.array([[module._REFUSED] * 3, [0] * 3, [module._REFUSED] * 3])
    nothing = np.zeros((3, 3), np.int64)
    assert module.was_refused(words) and module.as_told(words, nothing, nothing, nothing) is None
    words[0, 0] = words[2, 1] = module._NONE
    assert module.was_refused(words) and not module.was_refused(np.zeros_like(words))


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (backends.cudnn, "benchmark", True),
        (backends.cudnn, "deterministic", True),
        (backends.cudnn.conv, "fp32_precision", "ieee"),
        (backends.cuda.matmul, "fp32_precision", "tf32"),
        (backends.mkldnn.matmul, "fp32_precision", "bf16"),
        (backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    ],
)
def test_settings_by_which_last_bits_differ_are_another_kind(owner, name, value):
    device = torch.device("cpu")
    before, was = module.kind(device), getattr(owner, name)
    assert was != value and module.kind(device) == before
    setattr(owner, name, value)
    try:
        assert module.kind(device) != before
    finally:
        setattr(owner, name, was)
    assert module.kind(device) == before


def test_the_norm_of_sparse_gradients_is_that_of_dense_ones():
    places, values = torch.tensor([[1, 2, 2]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    sparse = torch.sparse_coo_tensor(places, values, (9, 2))
    rest = torch.ones(3)
    assert module.norm_bits([sparse, rest]) == module.norm_bits([torch.tensor([1.0, 2, 8, 10]), rest])
    assert module.norm_bits([torch.zeros(2, 2).to_sparse()]) == 0


def test_deterministic_algorithms_are_another_kind():
    before = module.kind(torch.device("cpu"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert module.kind(torch.device("cpu")) != before
    finally:
        torch.use_deterministic_algorithms(False)


def test_another_driver_is_another_kind(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_DRIVERS", (tmp_path / "none", tmp_path / "version"))
    before = module.kind(torch.device("cpu"))
    (tmp_path / "version").write_text("580.1\n")
    assert module.kind(torch.device("cpu")) != before


def test_a_parcel_may_be_some_times_as_large_as_what_a_replica_draws_itself():
    small, large = ([{"ids": torch.zeros(count, dtype=torch.int64)}] * M for count in (10, 10_000_000))
    assert most_bytes(small) == most_bytes([]) == 1 << 28
    assert most_bytes(large) == 16 * M * 80_000_000
    assert module.to_bytes(small).numel() < most_bytes(small)


@dataclass
class Labels:
    held: torch.Tensor


@dataclass
class Unfit(Labels):
    """A class that knows no copies."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


# what may hold a tensor, and how it is got back
HOLDERS = {
    "tensor": (lambda one: one, lambda held: held),
    "array": (lambda one: one.numpy(), torch.from_numpy),
    "dict of arrays": (lambda one: {"ids": one.numpy()}, lambda held: torch.from_numpy(held["ids"])),
    "OrderedDict": (lambda one: OrderedDict(ids=one), lambda held: held["ids"]),
    "UserDict": (lambda one: UserDict(ids=one), lambda held: held["ids"]),
    "dataclass": (Labels, lambda held: held.held),
    "no copies": (Unfit, lambda held: held.held),
}


def refilled(stage, replica, inside=lambda one: one):
    """One tensor, filled again for each micro-batch."""
    one = torch.zeros(2, 4, dtype=torch.int64)
    for index in range(2 * M):
        one.fill_(1000 * replica + index)
        yield inside(one), inside(one)


def test_a_loader_may_fill_the_same_tensors_again():
    world = World(refilled)
    given = world.step()
    for (stage, _), batches in given.items():
        assert [number(batch, stage) for batch in batches] == [1000 * world.source + index for index in range(M)]


@pytest.mark.parametrize("holder", [name for name in HOLDERS if name != "tensor"])
def test_it_may_where_what_holds_them_is_not_handed_over(holder):
    inside, back = HOLDERS[holder]
    world = World(lambda stage, replica: refilled(stage, replica, inside))

    def one_by_one(stage, replica):
        world.twins[stage, replica].begin_step(0, suspicion=False)
        return [int(back(world.twins[stage, replica].next_batch()[stage])[0, 0]) for _ in range(M)]

    for (stage, replica), found in world.everywhere(one_by_one).items():
        assert world.word(stage, replica) == module._REFUSED
        assert found == [1000 * replica + index for index in range(M)]


def test_one_that_cannot_be_copied_is_the_last_that_is_drawn_ahead():
    """The second, on one rank."""
    drawn = []

    def mixed(stage, replica):
        one = torch.zeros(2, 4, dtype=torch.int64)
        for index in range(M):
            one.fill_(1000 * replica + index)
            drawn.append((stage, replica))
            yield one, Unfit(one) if (stage, replica, index) == (1, 2, 1) else one

    world = World(mixed)
    world.everywhere(lambda *place: world.twins[place].begin_step(0, suspicion=False))
    assert drawn.count((1, 2)) == 2 and drawn.count((1, 1)) == M
    given = world.everywhere(lambda *place: [number(world.twins[place].next_batch(), 0) for _ in range(M)])
    assert all(found == [1000 * replica + index for index in range(M)] for (_, replica), found in given.items())
    assert drawn.count((1, 2)) == M


def test_what_hangs_on_a_tensor_is_copied_with_it():
    batch = torch.ones(2)
    batch.lengths = [1, 2]
    again = copied(batch)
    batch.lengths[0] = 9
    assert again.lengths == [1, 2]


def test_of_a_view_no_more_is_copied_than_it_shows():
    all_labels = torch.zeros(10**6)
    view = copied(UserDict(labels=all_labels[5:7]))["labels"]
    assert view.untyped_storage().nbytes() == 8


REPLAY = {**EVERY, "twins": {"replay": 1}}


@pytest.mark.parametrize("holder", [name for name in HOLDERS if name != "no copies"])
def test_what_is_computed_twice_is_the_same_twice(holder):
    inside, back = HOLDERS[holder]
    world = World(lambda stage, replica: refilled(stage, replica, inside), replicas=1, config=REPLAY)
    twins = world.twins[0, 0]
    assert not twins.hinders_replay(twins.draw_twice())
    given = [back(twins.next_batch()[0]) for _ in range(2 * M)]
    assert [int(one[0, 0]) for one in given] == [*range(M), *range(M)]
    given[0].fill_(7)
    assert int(given[M][0, 0]) == 0, "who alters one alters the other"


def test_what_cannot_be_copied_is_not_computed_twice_and_that_is_said(monkeypatch):
    said = warned(monkeypatch)
    inside, back = HOLDERS["no copies"]
    world = World(lambda stage, replica: refilled(stage, replica, inside), replicas=1, config=REPLAY)
    twins = world.twins[0, 0]
    assert twins.hinders_replay(twins.draw_twice()) and len(said) == 1 and "1 of 1 replays" in said[0]
    assert [int(back(twins.next_batch()[0])[0, 0]) for _ in range(M)] == [*range(M)]


def test_what_another_rank_cannot_compute_twice_nobody_does():
    world = World(whole, replicas=1, config=REPLAY)
    twins = world.twins[1, 0]
    assert not twins.draw_twice() and twins.hinders_replay(module._UNCOPIED)
    assert [number(twins.next_batch(), 1) for _ in range(M + 1)] == [*range(M + 1)]


def test_a_loader_that_ends_does_so_in_the_step_itself(monkeypatch):
    said = warned(monkeypatch)
    world = World(lambda stage, replica: whole(stage, replica)[:1], replicas=1, config=REPLAY)
    twins = world.twins[1, 0]
    assert twins.hinders_replay(twins.draw_twice()) and not said
    assert number(twins.next_batch(), 1) == 0
    with pytest.raises(StopIteration):
        twins.next_batch()


class Boxes(torch.Tensor):
    """What a subclass adds would be lost on the way."""


@pytest.mark.parametrize(
    "foreign",
    [
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.ones(2).as_subclass(Boxes),
        lambda: torch.eye(2).to_sparse(),
        lambda: 10**5000,
    ],
    ids=["nested", "subclass", "sparse", "huge"],
)
@pytest.mark.parametrize("where", [0, 1])
def test_where_something_is_no_dense_tensor_the_step_is_no_twin_step(foreign, where):
    def loaders(stage, replica):
        return [(foreign(), torch.ones(2)) if where == 0 else (torch.ones(2), foreign()) for _ in range(M)]

    world = World(loaders)
    world.step()
    assert {world.word(*place) for place in world.places} == {module._REFUSED}
