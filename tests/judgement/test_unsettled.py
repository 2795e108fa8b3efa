"""Who contradicts more workers of one stage than can be bad is convicted, and no honest worker ever is."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import World

from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.judgement.unsettled import Contradicted, Unsettled
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker, identity
from deepspeed_sentinel.response.dealing import Dealer

SETTINGS = settings(max_examples=60, deadline=None)


def drawn(mesh, generator):
    wiring = identity(mesh)
    for stage in range(1, mesh.stages - 1):
        wiring[stage] = generator.permutation(mesh.replicas)
    return wiring


class Steps:
    """Steps of a mesh of which all is known: who is bad, and whom it contradicts."""

    def __init__(self, mesh, bad, memory=100):
        self.mesh, self.bad = mesh, bad
        self.unsettled = Unsettled(mesh, memory)
        self.convicted = np.zeros_like(bad)

    def step(self, wiring, lies=lambda worker, partner: True, trial=None):
        """One step in which ``lies`` says what a bad worker does to whom; of each two at odds one is bad."""
        mesh = self.mesh
        by_ends, by_neighbours = np.zeros((2, 2, mesh.links, mesh.replicas), bool)
        for column in range(mesh.replicas):
            chain = [Worker(stage, int(wiring[stage, column])) for stage in range(mesh.stages)]
            for link in range(mesh.links):
                by_ends[FORWARD, link, column] = self._at_odds(chain[link], chain[link + 1], lies)
            for middle in range(1, mesh.stages - 1):
                by_neighbours[FORWARD, middle, column] = self._at_odds(chain[middle - 1], chain[middle + 1], lies)
        found = self.unsettled.step(wiring, by_ends, by_neighbours, trial, self.convicted)
        for one in found:
            self.convicted[one.worker] = True
        return found

    def _at_odds(self, one, other, lies):
        return (self.bad[one] and lies(one, other)) or (self.bad[other] and lies(other, one))


def trial(mesh, pairs=(), sound=(), unlike=()):
    differ = np.zeros((mesh.stages, mesh.replicas, mesh.replicas), bool)
    for stage, one, other in pairs:
        differ[stage, one, other] = differ[stage, other, one] = True
    were, by_nature = np.zeros((mesh.stages, mesh.replicas), bool), np.zeros(mesh.stages, bool)
    for worker in sound:
        were[worker] = True
    by_nature[list(unlike)] = True
    return SimpleNamespace(differ=differ, sound=were, unlike=by_nature)


def some_bad(mesh, generator):
    """Fewer than half of each stage, none of the first and the last."""
    bad = np.zeros((mesh.stages, mesh.replicas), bool)
    for stage in range(1, mesh.stages - 1):
        number = generator.integers((mesh.replicas - 1) // 2 + 1)
        bad[stage, generator.permutation(mesh.replicas)[:number]] = True
    return bad


@given(st.integers(3, 7), st.integers(1, 8), st.integers(0, 1 << 30), st.sampled_from([0.1, 0.5, 1.0]))
@SETTINGS
def test_no_honest_worker_is_ever_convicted(stages, replicas, seed, share):
    """Whoever lies, to whom it will, in any wirings, and in twin steps whatever the bad make of the same."""
    mesh, generator = Mesh(stages, replicas), np.random.default_rng(seed)
    bad = some_bad(mesh, generator)
    steps = Steps(mesh, bad)
    for _ in range(25):
        shown = None
        if generator.random() < 0.5:
            pairs = [
                (stage, one, other)
                for stage in range(stages)
                for one in range(replicas)
                for other in range(one)
                if (bad[stage, one] or bad[stage, other]) and generator.random() < share
            ]
            shown = trial(mesh, pairs, sound=map(tuple, np.argwhere(~bad)))
        steps.step(drawn(mesh, generator), lambda *_: generator.random() < share, shown)
        assert not (steps.convicted & ~bad).any()
        assert all(bad[one] or bad[other] for one, other in steps.unsettled.pairs(steps.convicted))


@given(st.integers(4, 7), st.integers(3, 8), st.integers(0, 1 << 30))
@SETTINGS
def test_a_liar_is_convicted_after_f_and_one_steps_with_other_partners(stages, replicas, seed):
    """Dealt as in a run: whoever it lies about, the next partner is another one."""
    mesh, generator = Mesh(stages, replicas), np.random.default_rng(seed)
    liar = Worker(int(generator.integers(1, stages - 1)), int(generator.integers(replicas)))
    bad = np.zeros((stages, replicas), bool)
    bad[liar] = True
    steps, dealer = Steps(mesh, bad), Dealer(mesh)
    beside = liar.stage + int(generator.choice([-1, 1]))
    nobody = np.zeros_like(bad)
    for step in range((replicas - 1) // 2 + 1):
        assert not steps.convicted.any()
        found = steps.step(dealer.wiring, lambda _, partner: partner.stage == beside)
        suspects = steps.unsettled.doubted & ~steps.convicted
        suspects[[0, -1]] = False
        pairs = steps.unsettled.pairs(steps.convicted)
        dealer.next(step, Doubts(nobody, suspects, nobody, nobody, pairs))
    assert [one.worker for one in found] == [liar] and len(found[0].partners) == (replicas - 1) // 2 + 1
    assert str(liar) in str(found[0]) and all(str(partner) in str(found[0]) for partner in found[0].partners)


def test_the_worked_example_of_the_docstring():
    mesh = Mesh(4, 3)
    bad = np.zeros((4, 3), bool)
    bad[1, 0] = True
    steps = Steps(mesh, bad)
    about_next = lambda _, partner: partner.stage == 2  # noqa: E731
    assert not steps.step(identity(mesh), about_next)
    assert steps.unsettled.pairs(steps.convicted) == ((Worker(1, 0), Worker(2, 0)),)
    assert np.argwhere(steps.unsettled.doubted).tolist() == [[1, 0], [2, 0]]
    wiring = identity(mesh)
    wiring[1] = [1, 0, 2]
    (found,) = steps.step(wiring, about_next)
    assert found.worker == (1, 0) and found.partners == ((2, 0), (2, 1))
    assert not steps.unsettled.pairs(steps.convicted) and not steps.unsettled.doubted.any(), "settled by its conviction"


@pytest.mark.parametrize(
    ("partners", "seen"),
    [
        ([(1, 1), (1, 2)], "given the same micro-batches, {0} made something else than {1} and {2}"),
        ([(2, 0), (2, 1)], "{0} reports other contents of messages over link 1 than {1} and {2}"),
        ([(0, 0), (0, 2)], "{0} reports other contents of messages over link 0 than {1} and {2}"),
        ([(3, 0), (3, 1)], "{0} reports other numbers of what entered and left stage 2 than {1} and {2}"),
    ],
)
def test_a_proof_says_what_was_seen_of_whom_and_where(partners, seen):
    worker, partners = Worker(1, 0), tuple(Worker(*one) for one in partners)
    told = str(Contradicted(worker, partners))
    assert told.startswith(f"PROVED: {seen.format(worker, *partners)}. Each time one of the two must be bad")
    assert told.endswith(f"that many workers of stage {partners[0].stage} cannot be: so it is {worker}")


def test_the_same_partner_again_convicts_nobody():
    mesh, bad = Mesh(4, 3), np.zeros((4, 3), bool)
    bad[1, 0] = True
    steps = Steps(mesh, bad)
    for _ in range(20):
        assert not steps.step(identity(mesh))


def test_what_is_long_ago_is_forgotten():
    mesh, bad = Mesh(4, 3), np.zeros((4, 3), bool)
    bad[1, 0] = True
    steps = Steps(mesh, bad, memory=5)
    other = identity(mesh)
    other[1] = [1, 0, 2]
    steps.step(identity(mesh))
    for _ in range(5):
        assert not steps.step(identity(mesh), lambda *_: False)
    assert not steps.unsettled.pairs(steps.convicted)
    assert not steps.step(other)


def test_two_replicas_tell_nobody():
    mesh, bad = Mesh(4, 2), np.zeros((4, 2), bool)
    bad[1, 0] = True
    steps = Steps(mesh, bad)
    for wiring in (identity(mesh), np.array([[0, 1], [1, 0], [0, 1], [0, 1]])):
        assert not steps.step(wiring)


def test_of_one_stage_that_counts_only_where_work_is_the_same_bit_for_bit():
    mesh = Mesh(4, 3)
    steps = Steps(mesh, np.zeros((4, 3), bool))
    assert not steps.step(identity(mesh), trial=trial(mesh, [(1, 0, 1)]))
    assert not steps.step(identity(mesh), trial=trial(mesh, [(1, 0, 2)])), "it may be by nature"
    (found,) = steps.step(identity(mesh), trial=trial(mesh, sound=[(1, 1), (1, 2)]))
    assert found.worker == (1, 0)
    steps = Steps(mesh, np.zeros((4, 3), bool))
    steps.step(identity(mesh), trial=trial(mesh, sound=[(1, 1), (1, 2)]))
    steps.step(identity(mesh), trial=trial(mesh, unlike=[1]))
    assert not steps.step(identity(mesh), trial=trial(mesh, [(1, 0, 1), (1, 0, 2)]))


@pytest.mark.parametrize("groups", [[0, 0, 1, 1], [0, 0, 1, 2, 3], [0, 0, 1, 1, 2, 2]], ids=str)
def test_more_of_a_stage_than_can_be_bad_do_not_convict_each_other(groups):
    """As those would that make one of two honest versions."""
    mesh = Mesh(4, len(groups))
    pairs = [(1, *pair) for pair in combinations(range(mesh.replicas), 2) if groups[pair[0]] != groups[pair[1]]]
    steps = Steps(mesh, np.zeros((4, mesh.replicas), bool))
    steps.step(identity(mesh), trial=trial(mesh, sound=[(1, 0), (1, 1)]))
    assert not steps.step(identity(mesh), trial=trial(mesh, pairs))
    assert not steps.step(identity(mesh), trial=trial(mesh, pairs, sound=[(1, 0)])), "refuted"


def test_who_is_convicted_and_goes_on_is_told_again():
    """So that its probation does not begin."""
    mesh, bad = Mesh(4, 3), np.zeros((4, 3), bool)
    bad[1, 0] = True
    steps = Steps(mesh, bad)
    other = identity(mesh)
    other[1] = [1, 0, 2]
    steps.step(identity(mesh))
    assert steps.step(other) and steps.step(other)
    assert not steps.step(other, lambda *_: False)


def test_its_state_goes_on_elsewhere():
    mesh, bad = Mesh(4, 3), np.zeros((4, 3), bool)
    bad[1, 0] = True
    one, other = Steps(mesh, bad), Steps(mesh, bad)
    one.step(identity(mesh))
    other.unsettled.load_state_dict(one.unsettled.state_dict())
    wiring = identity(mesh)
    wiring[1] = [1, 0, 2]
    assert [found.worker for found in other.step(wiring)] == [(1, 0)]


# In the judge.

ENERGY, L2_REL, SLOPE, COSINE = (
    NAMES.index(name) for name in ("energy", "l2_rel", "prediction_slope", "transfer_cosine")
)


def other_digest(direction, link, column):
    def mark(digests):
        digests[1, direction, link, column] = 5

    return mark


def warm(**more):
    world = World(stages=5, replicas=3, conviction="proof", **more)
    world.warm_up()
    return world


def swapped(stage, one, other):
    wiring = identity(Mesh(5, 3))
    wiring[stage, [one, other]] = wiring[stage, [other, one]]
    return wiring


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_ends_of_a_disputed_link_are_to_be_tried_and_kept_apart(direction):
    world = warm()
    verdict = world.step(digests=other_digest(direction, 1, 0))
    about = world.judge.doubts
    assert about.apart == ((Worker(1, 0), Worker(2, 0)),)
    assert np.argwhere(about.suspects).tolist() == [[1, 0], [2, 0]] == np.argwhere(verdict.suspects).tolist()
    assert not about.accused.any() and world.judge.record.suspicion and not world.judge.record.strikes.any()


def test_of_a_trusted_end_nothing_is_suspected():
    world = warm()
    world.step(digests=other_digest(FORWARD, 0, 1))
    about = world.judge.doubts
    assert about.apart == ((Worker(0, 1), Worker(1, 1)),) and np.argwhere(about.suspects).tolist() == [[1, 1]]


def test_who_disputes_with_two_partners_is_convicted_in_the_judge():
    world = warm()
    world.step(digests=other_digest(FORWARD, 1, 0))
    verdict = world.step(digests=other_digest(FORWARD, 1, 1), served=swapped(1, 0, 1))
    assert verdict.newly_convicted == (Worker(1, 0),)
    assert [one.worker for one in verdict.contradicted] == [Worker(1, 0)]
    assert not world.judge.doubts.apart and np.argwhere(verdict.suspects).tolist() == [[2, 0]]
    again = world.step(digests=other_digest(FORWARD, 1, 1), served=swapped(1, 0, 1))
    assert not again.contradicted and again.convicted[1, 0], "it is told once"


def test_neighbours_that_report_other_numbers_of_the_same_are_at_odds():
    def lie(values):
        values[1, FORWARD, 2, 0, :, SLOPE] += 3.0

    world = warm()
    world.step(lie)
    assert world.judge.doubts.apart == ((Worker(1, 0), Worker(3, 0)),)


def test_numbers_that_rest_on_a_baseline_are_a_dispute_and_no_proof():
    def lie(values):
        values[1, FORWARD, 2, 0, :, L2_REL] *= 3.0

    world = warm()
    assert world.step(lie).disputed and not world.judge.doubts.apart


def test_a_neighbour_that_has_nothing_to_say_is_a_dispute_and_no_proof():
    def silent(values):
        values[:, FORWARD, 2, 0, :, COSINE] = np.nan

    world = warm()
    assert world.step(silent).disputed and not world.judge.doubts.apart


def test_whoever_is_found_sound_is_no_longer_suspected_for_a_dispute():
    world = warm()
    world.step(digests=other_digest(FORWARD, 1, 0))
    alike = np.ones((5, 3), np.int64)
    verdict = world.step(twins=Twins(0, np.ones(3, bool), alike, np.ones((5, 3)), np.zeros_like(alike)))
    assert set(verdict.cleared) == {(1, 0), (2, 0)} and not verdict.suspects.any()
    assert world.judge.doubts.apart, "they are kept apart all the same"


def test_a_released_worker_is_to_be_tried():
    world = warm(probation_steps=4)
    world.step(digests=other_digest(FORWARD, 1, 0))
    world.step(digests=other_digest(FORWARD, 1, 1), served=swapped(1, 0, 1))
    released = [world.step() for _ in range(4)][-1]
    assert released.released == (Worker(1, 0),) and released.suspects[1, 0]
    alike = np.ones((5, 3), np.int64)
    verdict = world.step(twins=Twins(0, np.ones(3, bool), alike, np.ones((5, 3)), np.zeros_like(alike)))
    assert not verdict.suspects.any()


def test_skipped_steps_that_teach_nothing_new_halt():
    def in_all(digests):
        digests[1, FORWARD, 1] = 5

    world = warm()
    skipped = [world.step(digests=in_all) for _ in range(6)]
    assert all(verdict.skip for verdict in skipped)
    assert [bool(verdict.halt) for verdict in skipped] == [False] * 5 + [True], "the first told who is at odds"


def test_a_suspect_that_comes_and_goes_is_no_news():
    def loud(values):
        values[:, FORWARD, 1, :, :, NAMES.index("non_finite")] = 1

    world = warm(max_skipped_steps=4)
    verdicts = []
    for _ in range(4):
        verdicts.append(world.step(loud))
        world.judge.record._struck[:] = False  # as if a twin step had cleared it
    assert not verdicts[-1].halt and world.step(loud).halt


def test_too_few_clean_columns_halt_and_name_the_workers():
    world = World(stages=5, replicas=3, conviction="proof", action="quarantine", min_clean_columns=2)
    world.warm_up()
    world.step(digests=other_digest(FORWARD, 1, 0))
    assert not world.step(digests=other_digest(FORWARD, 1, 1), served=swapped(1, 0, 1)).halt
    world.step(digests=other_digest(FORWARD, 1, 1))
    halt = world.step(digests=other_digest(FORWARD, 1, 2), served=swapped(1, 1, 2)).halt
    assert (
        "only 1 columns" in halt
        and "(stage 1, replica 0), worker (stage 1, replica 1)" in halt
        and "min_clean_columns" in halt
    )


def test_a_convicted_worker_counts_against_nobody():
    """In each step one of three is wrong at most; whom the convicted one is at odds with may be another than it was."""
    mesh = Mesh(4, 3)
    steps = Steps(mesh, np.zeros((4, 3), bool))
    steps.convicted[1, 2] = True
    sound = trial(mesh, sound=[Worker(1, 0), Worker(1, 1)])
    wiring = identity(mesh)
    steps.unsettled.step(wiring, np.zeros((2, 3, 3), bool), np.zeros((2, 3, 3), bool), sound, steps.convicted)
    for pairs in ([(1, 0, 1)], [(1, 1, 2)], [(1, 0, 1), (1, 1, 2), (1, 0, 2)]):
        nothing = np.zeros((2, 3, 3), bool)
        found = steps.unsettled.step(wiring, nothing, nothing, trial(mesh, pairs=pairs), steps.convicted)
        assert not [one for one in found if one.worker != Worker(1, 2)]


def test_what_a_state_holds_of_stages_that_are_not_there_is_nothing():
    unsettled, mesh = Unsettled(Mesh(4, 3), 20), Mesh(4, 3)
    state = unsettled.state_dict()
    state["left"] = np.ones_like(state["left"])
    unsettled.load_state_dict(state)
    assert all(
        one.stage < mesh.stages and other.stage < mesh.stages for one, other in unsettled.pairs(np.zeros((4, 3)))
    )
