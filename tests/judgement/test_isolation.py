"""Who keeps columns out unproved ends up in as few of them as can hold the bad, and is not convicted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import World

from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.evidence.table import NAMES, OF_PAIR, RECEIVED
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.judgement.isolation import Isolation
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, columns_of, identity
from deepspeed_sentinel.response.dealing import Dealer

L2_REL, ENERGY = NAMES.index("l2_rel"), NAMES.index("energy")
ROWS = ("transfer_gain", "transfer_cosine", "token_gram", "transfer_step")
BY = (0.5, -0.9, -0.5, 3.0)


class Steps:
    """A run of which all is known: who is bad, and what it does to whom. ``isolation.py`` and the dealer are real."""

    def __init__(self, mesh, bad, memory=10_000, wiring=None):
        self.mesh, self.bad = mesh, bad
        self.isolation, self.dealer = Isolation(mesh, memory, memory, acts=True), Dealer(mesh)
        if wiring is not None:
            self.dealer.load_state_dict({"wiring": wiring})
        self.convicted = np.zeros_like(bad)
        self.time = 0

    def step(self, events, convict=()):
        """``events`` is what happens in a wiring: bool [events, S, C]. Returns how many columns are lost."""
        served = self.dealer.wiring.copy()
        involved = events(served)
        for worker in convict:
            self.convicted[worker] = True
        nobody = np.zeros_like(self.bad)
        unblamed = np.zeros(self.mesh.replicas, bool)
        self.isolation.step(served, involved, nobody[None][:0], unblamed, (), nobody, self.convicted, bool(convict))
        isolated = self.isolation.isolated
        assert not (isolated & self.convicted).any() and not isolated[[0, -1]].any()
        packed = isolated | self.convicted
        self.dealer.next(self.time, Doubts(packed, nobody, nobody, nobody))
        self.time += 1
        return int(np.count_nonzero(involved.any((0, 1))))


def some_bad(mesh, generator, most=None):
    bad = np.zeros((mesh.stages, mesh.replicas), bool)
    for stage in range(1, mesh.stages - 1):
        number = generator.integers(min((mesh.replicas - 1) // 2, mesh.replicas if most is None else most) + 1)
        bad[stage, generator.permutation(mesh.replicas)[:number]] = True
    return bad


def drawn(mesh, generator):
    wiring = identity(mesh)
    for stage in range(1, mesh.stages - 1):
        wiring[stage] = generator.permutation(mesh.replicas)
    return wiring


def lies(steps, generator, share, reach, cunning):
    """Each bad worker lies or not, about ``reach`` workers in a row with it; the cunning not where others lie too."""

    def events(served):
        mesh, found = steps.mesh, []
        taken = set()
        for stage, replica in generator.permutation(np.argwhere(steps.bad)).tolist():
            column = int(columns_of(served)[stage, replica])
            if generator.random() >= share or (cunning and column in taken):
                continue
            taken.add(column)
            first = stage - int(generator.integers(reach))
            first = min(max(first, 0), mesh.stages - reach)
            found.append(np.zeros((mesh.stages, mesh.replicas), bool))
            found[-1][first : first + reach, column] = True
        return np.array(found, bool).reshape(len(found), mesh.stages, mesh.replicas)

    return events


LIARS = {
    "stages": st.integers(4, 7),
    "replicas": st.integers(3, 8),
    "seed": st.integers(0, 1 << 30),
    "share": st.sampled_from([0.2, 0.6, 1.0]),
    "reach": st.sampled_from([2, 3]),
    "cunning": st.booleans(),
}


@given(**LIARS)
@settings(max_examples=20, deadline=None)
def test_whoever_lies_few_columns_are_lost_beyond_the_bad_of_one_stage(**drawn):
    few_columns_are_lost(**drawn)


@pytest.mark.long
@given(**LIARS)
@settings(max_examples=100, deadline=None)
def test_it_is_so_of_many_liars(**drawn):
    few_columns_are_lost(**drawn)


def few_columns_are_lost(stages, replicas, seed, share, reach, cunning):
    """However often, about whom, from whatever wiring, and whoever is convicted in the meantime."""
    mesh, generator = Mesh(stages, replicas), np.random.default_rng(seed)
    bad = some_bad(mesh, generator)
    steps = Steps(mesh, bad, wiring=drawn(mesh, generator))
    a_stage, number, most = int(bad.sum(1).max()), int(bad.sum()), (replicas - 1) // 2
    allowed = number * (2 * most + 1 if reach == 2 else 6 * most * replicas + 1)
    events = lies(steps, generator, share, reach, cunning)
    extra = 0
    for _ in range(120):
        convict = [tuple(generator.permutation(np.argwhere(bad))[0])] if number and generator.random() < 0.02 else ()
        extra += max(0, steps.step(events, convict) - a_stage)
        packed = steps.isolation.isolated | steps.convicted
        assert packed.sum(1).max() <= a_stage
        assert not steps.isolation._unexplained, "the bad themselves are an explanation"
    assert extra <= allowed


def test_nobody_is_isolated_and_nothing_moves_without_an_event():
    mesh = Mesh(6, 3)
    steps = Steps(mesh, np.zeros((6, 3), bool))
    for _ in range(20):
        assert steps.step(lambda served: np.zeros((0, 6, 3), bool)) == 0
    assert (steps.dealer.wiring == identity(mesh)).all() and not steps.isolation.isolated.any()


def pairs(*between):
    """(stage, replica) and who serves the next stage in its column are at odds, as long as they are of one column."""

    def events(served):
        found = np.zeros((len(between), *served.shape), bool)
        for event, (stage, replica) in enumerate(between):
            found[event, stage : stage + 2, columns_of(served)[stage, replica]] = True
        return found

    return events


def test_the_worked_example_of_the_docstring():
    mesh = Mesh(6, 3)
    steps = Steps(mesh, np.zeros((6, 3), bool))
    assert steps.step(pairs((0, 0), (1, 1), (2, 2))) == 3
    assert np.argwhere(steps.isolation.isolated).tolist() == [[1, 0], [2, 1], [3, 2]] and steps.isolation.news
    assert (steps.dealer.wiring[[1, 2, 3], 0] == [0, 1, 2]).all()


def test_who_is_isolated_is_forgotten_with_what_it_was_isolated_for_and_not_before():
    mesh = Mesh(5, 3)
    steps = Steps(mesh, np.zeros((5, 3), bool), memory=6)
    nothing = lambda served: np.zeros((0, 5, 3), bool)  # noqa: E731
    for _ in range(3):
        steps.step(pairs((1, 1)))
        for _ in range(5):
            steps.step(nothing)
            assert steps.isolation.isolated.any()
    steps.step(nothing)
    assert not steps.isolation.isolated.any() and not len(steps.isolation._events)


def test_a_broken_first_stage_costs_its_own_column_and_comes_to_rest():
    """It is at odds with whoever stands beside it, so what it accuses stays there."""
    mesh = Mesh(5, 5)
    steps = Steps(mesh, np.zeros((5, 5), bool), wiring=drawn(mesh, np.random.default_rng(0)))
    before = steps.dealer.wiring.copy()
    for _ in range(10):
        assert steps.step(pairs((0, 2))) == 1
    assert (steps.dealer.wiring == before).all()


def test_what_fewer_than_half_of_each_stage_cannot_explain_is_forgotten():
    mesh = Mesh(5, 3)
    everybody = np.zeros((5, 3), bool)
    everybody[1:4] = True
    steps, generator = Steps(mesh, everybody, memory=50), np.random.default_rng(0)
    news = 0
    for _ in range(200):
        steps.step(lies(steps, generator, 1.0, 2, False))
        news += steps.isolation.news
        assert steps.isolation.isolated.sum(1).max() <= 1 and len(steps.isolation._events) < 60
    assert news < 10, "what keeps a run from halting does not go on for ever"


def silences(steps, generator):
    """In each column a neighbour of somebody has nothing to say: three with a bad one, none isolated if possible."""

    def events(served):
        mesh, columns = steps.mesh, np.arange(steps.mesh.replicas)
        found = []
        for column in columns.tolist():
            threes = [
                (bool(steps.isolation.isolated[where, served[where, column]].any()), where[0])
                for where in np.arange(mesh.stages - 2)[:, None] + np.arange(3)
                if steps.bad[where, served[where, column]].any()
            ]
            if threes:
                pool = [first for seen, first in threes if seen == min(threes)[0]]
                found.append(np.zeros((mesh.stages, mesh.replicas), bool))
                first = pool[int(generator.integers(len(pool)))]
                found[-1][first : first + 3, column] = True
        return np.array(found, bool).reshape(len(found), mesh.stages, mesh.replicas)

    return events


@pytest.mark.parametrize(("size", "number"), [(12, 50), (16, 70)])
def test_the_most_liars_that_there_may_be_end_in_as_many_columns(size, number):
    """Hundreds of events are remembered before all are explained, and each skipped step until then brings another."""
    mesh, generator = Mesh(size, size), np.random.default_rng(0)
    bad, most = np.zeros((size, size), bool), (size - 1) // 2
    for stage in range(1, size - 1):
        bad[stage, generator.permutation(size)[:most]] = True
    steps = Steps(mesh, bad, memory=200, wiring=drawn(mesh, generator))
    events, lost = silences(steps, generator), []
    for _ in range(number):
        lost.append(steps.step(events))
        assert lost[-1] < size or steps.isolation.news
    assert max(lost[-8:]) <= most and not steps.isolation._unexplained


def test_of_too_many_events_the_oldest_give_way_and_what_is_new_is_news():
    mesh, nobody = Mesh(6, 5), np.zeros((6, 5), bool)
    steps = Steps(mesh, nobody)
    steps.isolation._most = 3
    between = [(1, 0), (2, 1), (3, 2), (1, 3), (2, 4)]
    for one in between:
        steps.step(pairs(one))
        assert steps.isolation.news and not steps.isolation._unexplained and len(steps.isolation._events) <= 3
    other = Steps(mesh, nobody)
    other.isolation._most = 2
    other.isolation.load_state_dict(steps.isolation.state_dict())
    assert list(other.isolation._events) == list(steps.isolation._events)[-2:]


@pytest.mark.parametrize(("replicas", "acts"), [(2, True), (1, True), (3, False)])
def test_where_nothing_is_dealt_nobody_is_isolated(replicas, acts):
    mesh = Mesh(5, replicas)
    isolation, nobody = Isolation(mesh, 100, 100, acts), np.zeros((5, replicas), bool)
    isolation.step(
        identity(mesh), pairs((1, 0))(identity(mesh)), nobody[None][:0], nobody[0], (), nobody, nobody, False
    )
    assert not isolation.isolated.any() and not len(isolation.state_dict()["events"])


def test_its_state_goes_on_elsewhere_and_what_is_impossible_in_it_is_left_out():
    mesh, nobody = Mesh(6, 3), np.zeros((6, 3), bool)
    one, other = Steps(mesh, nobody), Steps(mesh, nobody)
    one.step(pairs((1, 1), (2, 2)))
    state = one.isolation.state_dict()
    other.isolation.load_state_dict(state)
    other.dealer.load_state_dict(one.dealer.state_dict())
    for steps in (one, other):
        steps.step(pairs((3, 0)))
    assert (one.isolation.isolated == other.isolation.isolated).all() and one.isolation.isolated.any()
    assert (one.dealer.wiring == other.dealer.wiring).all()
    state["events"][0, 0] = 6
    other.isolation.load_state_dict(state)
    assert len(other.isolation._events) == len(state["events"]) - 1


def test_what_is_remembered_for_longer_than_a_dispute_is_taken_up_too():
    mesh, nobody = Mesh(6, 3), np.zeros((6, 3), bool)
    isolation = Isolation(mesh, 30, 80, acts=True)
    unblamed = np.array([True, False, False])
    isolation.step(identity(mesh), np.zeros((0, 6, 3), bool), nobody[None][:0], unblamed, (), nobody, nobody, False)
    low, high = isolation.limits["events"]
    events = isolation.state_dict()["events"]
    assert events.size and low <= events.min() and events.max() <= high


# In the judge.


def baseline(values, stage, column, step):
    values[RECEIVED, FORWARD, stage - 1, column, :, L2_REL] *= 3.0


def silent(values, stage, column, step):
    where = (FORWARD, stage - 1) if stage >= 2 else (BACKWARD, stage)
    values[:, where[0], where[1], column][..., OF_PAIR] = np.nan


def sketch(values, stage, column, step):
    """Its neighbour's neighbour agrees, so the worker between is accused; in another row each time."""
    where = (FORWARD, stage - 1) if stage >= 2 else (BACKWARD, stage)
    values[:, where[0], where[1], column, :, NAMES.index(ROWS[step % 4])] += BY[step % 4] * (1 + step % 8 // 4)


class Loop:
    """Real judge and dealer, a training run but for the numbers."""

    def __init__(self, stages, replicas, seed=0, wiring=None):
        how = {"action": "quarantine", "conviction": "proof", "max_skipped_steps": 10, "probation_steps": 200}
        self.world = World(stages, replicas, seed=seed, micro_batches=2, **how)
        self.world.warm_up(24)
        self.judge, self.mesh, self.dealer = self.world.judge, self.world.mesh, Dealer(self.world.mesh)
        if wiring is not None:
            self.dealer.load_state_dict({"wiring": wiring})
        self.generator, self.time, self.twins = np.random.default_rng(seed), 0, 0

    def step(self, liars, lie, only_unsuspected=False):
        served, shape = self.dealer.wiring.copy(), (self.mesh.stages, self.mesh.replicas)
        columns, suspicion, twins = columns_of(served), self.judge.record.suspicion, None
        if self.generator.random() < suspicion:
            alike = np.ones(shape, np.int64)
            twins = Twins(0, np.ones(shape[1], bool), alike, np.ones(shape), np.zeros_like(alike))
            self.twins += 1

        def change(values):
            if twins is not None:
                values[:] = values[:, :, :, :1]
            for stage, replica in [] if only_unsuspected and suspicion else liars:
                lie(values, stage, columns[stage, replica], self.time)

        verdict = self.world.step(change, served=served, twins=twins)
        self.dealer.next(self.time, self.judge.doubts)
        self.time += 1
        assert not verdict.halt and not verdict.convicted.any()
        return verdict


THREE, FOUR = [(1, 0), (2, 1), (3, 2)], [(1, 0), (2, 1), (3, 2), (4, 3)]


@pytest.mark.parametrize("lie", [baseline, silent])
@pytest.mark.parametrize(("stages", "replicas", "liars"), [(6, 3, THREE), (7, 4, FOUR)])
def test_liars_that_nothing_proves_end_in_one_column(lie, stages, replicas, liars):
    loop = Loop(stages, replicas)
    verdicts = [loop.step(liars, lie) for _ in range(25)]
    assert sum(verdict.skip for verdict in verdicts) <= 2
    assert all(np.count_nonzero(verdict.excluded) <= 1 for verdict in verdicts[4:])
    assert len({int(columns_of(loop.dealer.wiring)[liar]) for liar in liars}) == 1


def test_one_liar_moves_nobody_and_others_train():
    loop = Loop(6, 3)
    assert all(loop.step(THREE[:1], baseline).excluded.tolist() == [True, False, False] for _ in range(5))
    assert (loop.dealer.wiring == identity(loop.mesh)).all()


MESHES = st.integers(4, 6), st.integers(3, 5), st.integers(0, 1 << 30), st.sampled_from([baseline, silent])


@given(*MESHES)
@settings(max_examples=3, deadline=None)
def test_the_clean_columns_are_all_but_the_bad_of_one_stage(stages, replicas, seed, lie):
    clean_columns_train(stages, replicas, seed, lie)


@pytest.mark.long
@given(*MESHES)
@settings(max_examples=20, deadline=None)
def test_they_are_so_in_many_meshes(stages, replicas, seed, lie):
    clean_columns_train(stages, replicas, seed, lie)


def clean_columns_train(stages, replicas, seed, lie):
    """After steps in which somebody new was found out, whoever lies, from whatever wiring."""
    mesh, generator = Mesh(stages, replicas), np.random.default_rng(seed)
    bad = some_bad(mesh, generator, most=1)  # with more, most ends of a link may differ, which is nobody's dispute
    loop = Loop(stages, replicas, wiring=drawn(mesh, generator))
    liars = list(map(tuple, np.argwhere(bad)))
    lost = [np.count_nonzero(loop.step(liars, lie).excluded) for _ in range(25)]
    assert max(lost[-8:], default=0) <= int(bad.any())


@pytest.mark.parametrize(("wiring", "isolated"), [("heal", 3), ("static", 0), ("shuffle", 0)])
def test_nobody_is_isolated_where_nothing_heals(wiring, isolated):
    world = World(6, 3, micro_batches=2, conviction="proof", wiring=wiring)
    world.warm_up(24)
    assert world.step(lambda values: [baseline(values, *liar, 0) for liar in THREE]).excluded.all()
    assert world.judge.doubts.packed.sum() == isolated
    assert (
        world.step().isolated == world.judge.isolation.isolated
    ).all() and world.judge.isolation.isolated.sum() == isolated


def test_sketches_that_accuse_in_vain_cost_fewer_and_fewer_twin_steps():
    loop = Loop(6, 3)
    verdicts = [loop.step(THREE[:1], sketch, only_unsuspected=True) for _ in range(200)]
    lost = np.array([verdict.excluded for verdict in verdicts])
    assert loop.twins < 40 and np.count_nonzero(lost) < 45
    assert not lost[-100:].all(1).any() and loop.twins, "the accused is tried and cleared"


def test_who_is_isolated_and_comes_to_be_suspected_is_tried():
    loop = Loop(6, 3)
    loop.step(THREE, baseline)

    def loud(values, stage, column, step):
        values[:, FORWARD, stage, column, :, NAMES.index("non_finite")] = 1

    loop.step(THREE[-1:], loud)
    about = loop.judge.doubts
    assert about.suspects[3, 2] and not about.packed[3, 2] and loop.judge.isolation.isolated[3, 2]


def test_pairs_of_which_the_first_excuses_the_second_end_in_one_column():
    """The first is half-way to a fence in all that it sends, so that what the second sends is nobody's fault."""
    loop, pairs = Loop(8, 3), [(1, 0), (3, 1), (5, 2)]

    def covered(values, stage, column, step):
        second = int(columns_of(loop.dealer.wiring)[stage + 1, (stage - 1) // 2])
        if second == column:
            values[:, FORWARD, stage, column, :, ENERGY] *= 2.3
            values[:, FORWARD, stage + 1, column, :, ENERGY] *= 400.0

    verdicts = [loop.step(pairs, covered) for _ in range(40)]
    assert verdicts[0].skip and not any(one.strikes for one in verdicts[0].findings)
    assert sum(verdict.skip for verdict in verdicts) <= 8
    assert all(np.count_nonzero(verdict.excluded) <= 1 for verdict in verdicts[20:])
