"""Columns are dealt so that few are lost, and nobody moves who need not."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.mesh import Mesh, Worker, check_wiring, columns_of, identity
from deepspeed_sentinel.response.dealing import Dealer

SETTINGS = settings(max_examples=60, deadline=None)


def doubts(mesh, convicted=(), suspects=(), apart=(), accused=()):
    arrays = np.zeros((3, mesh.stages, mesh.replicas), bool)
    for array, workers in zip(arrays, (convicted, (*suspects, *accused), accused), strict=True):
        for worker in workers:
            array[worker] = True
    return Doubts(
        *arrays, np.zeros_like(arrays[0]), tuple(tuple(sorted(Worker(*one) for one in pair)) for pair in apart)
    )


@st.composite
def situations(draw, apart=True):
    """A dealer whose columns were dealt at random, and doubts that may come up in its mesh."""
    mesh = Mesh(draw(st.integers(3, 7)), draw(st.integers(1, 9)))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    dealer = Dealer(mesh)
    wiring = identity(mesh)
    if draw(st.booleans()):
        for stage in range(1, mesh.stages - 1):
            wiring[stage] = generator.permutation(mesh.replicas)
    dealer.load_state_dict({"wiring": wiring})
    shape = (mesh.stages, mesh.replicas)
    convicted = generator.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
    convicted[[0, -1]] = False
    suspects = (generator.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))) & ~convicted
    suspects[[0, -1]] = False
    pairs = []
    for _ in range(draw(st.integers(0, 5)) if apart else 0):
        stage, distance = int(generator.integers(mesh.stages)), int(generator.integers(3))
        if stage + distance >= mesh.stages:
            continue
        one, other = (Worker(at, int(generator.integers(mesh.replicas))) for at in (stage, stage + distance))
        trusted = mesh.is_trusted(one.stage) and mesh.is_trusted(other.stage)
        if one < other and not trusted:
            pairs.append((one, other))
    if draw(st.booleans()):  # as in a run: both are suspected, unless they are convicted
        for worker in (worker for pair in pairs for worker in pair):
            suspects[worker] = not (convicted[worker] or mesh.is_trusted(worker.stage))
    accused = suspects & (generator.random(shape) < 0.5)
    untried = (generator.random(shape) < draw(st.sampled_from([0.0, 0.3]))) & ~(convicted | suspects)
    untried[[0, -1]] = False
    isolated = (generator.random(shape) < draw(st.sampled_from([0.0, 0.0, 0.1, 0.3]))) & ~(convicted | suspects)
    isolated[[0, -1]] = False
    packed = convicted | (isolated & ~suspects.any(1, keepdims=True))
    about = Doubts(packed, suspects, accused, untried & ~packed, tuple(dict.fromkeys(pairs)), isolated)
    return dealer, about, draw(st.integers(0, 1000))


def by_column(which, wiring):
    return np.take_along_axis(which, wiring, axis=1)


@given(situations())
@SETTINGS
def test_what_is_dealt_is_a_wiring_and_the_same_everywhere(situation):
    dealer, about, step = situation
    other = Dealer(dealer._mesh)
    other.load_state_dict(dealer.state_dict())
    wiring = dealer.next(step, about)
    check_wiring(dealer._mesh, wiring)
    assert wiring.dtype == np.int64
    assert (other.next(step, about) == wiring).all() and (other.wiring == wiring).all()


@given(situations())
@SETTINGS
def test_no_dealing_leaves_more_columns_without_convicted_workers(situation):
    """A stage's convicted workers stand in as many columns as there are of them, so none can leave more."""
    dealer, about, step = situation
    wiring = dealer.next(step, about)
    for which in (about.packed, about.packed & ~about.isolated):
        most = np.count_nonzero(which, axis=1).max()
        without = ~by_column(which, wiring).any(0)
        assert np.count_nonzero(without) == dealer._mesh.replicas - most


@pytest.mark.parametrize(
    "before", [identity(Mesh(5, 4)), np.array([[0, 1, 2, 3]] + [[3, 2, 1, 0]] * 3 + [[0, 1, 2, 3]])]
)
def test_who_is_isolated_costs_no_column_beside_those_of_the_convicted(before):
    mesh = Mesh(5, 4)
    dealer = Dealer(mesh)
    dealer.load_state_dict({"wiring": before})
    about = doubts(mesh, convicted=[(1, 0), (2, 1), (3, 2)])
    isolated = np.zeros_like(about.packed)
    isolated[2, 2] = True
    wiring = dealer.next(0, replace(about, packed=about.packed | isolated, isolated=isolated))
    assert np.count_nonzero(by_column(about.packed, wiring).any(0)) == 1
    assert np.count_nonzero(by_column(about.packed | isolated, wiring).any(0)) == 2


@given(situations())
@SETTINGS
def test_it_comes_to_rest(situation):
    """With the same doubts, in the same turn, the next deal has nothing left to do."""
    dealer, about, step = situation
    dealt = dealer.next(step, about).copy()
    assert (dealer.next(step, about) == dealt).all()


@given(st.integers(4, 7), st.integers(3, 8), st.integers(0, 1 << 30))
@SETTINGS
def test_it_comes_to_rest_when_liars_fall_silent(stages, replicas, seed):
    """At most f of a stage, at odds with those who happened to serve beside them for some steps, from the first on."""
    mesh, generator = Mesh(stages, replicas), np.random.default_rng(seed)
    dealer, pairs = Dealer(mesh), set()
    liars = [
        Worker(stage, int(replica))
        for stage in range(1, stages - 1)
        for replica in generator.permutation(replicas)[: (replicas - 1) // 2]
    ]
    about = doubts(mesh)
    for step in range(int(generator.integers(1, 5))):
        columns = columns_of(dealer.wiring)
        for liar in liars:
            stage = liar.stage + int(generator.choice([-2, -1, 1, 2]))
            if generator.random() < 0.5 and 0 <= stage < stages:
                pairs.add(tuple(sorted((liar, Worker(stage, int(dealer.wiring[stage, columns[liar]]))))))
        suspects = [worker for pair in pairs for worker in pair if not mesh.is_trusted(worker.stage)]
        about = doubts(mesh, suspects=suspects, apart=sorted(pairs))
        dealer.next(step, about)
    rest = dealer.next(0, about).copy()
    assert all((dealer.next(step, about) == rest).all() for step in range(1, 8))


def test_who_is_apart_already_stays_when_others_are_suspected():
    """A new suspect in one stage moves nobody of stages that have nothing to do with it."""
    mesh = Mesh(9, 4)
    dealer, pair = Dealer(mesh), ((1, 2), (2, 2))
    first = dealer.next(0, doubts(mesh, suspects=pair, apart=[pair])).copy()
    second = dealer.next(1, doubts(mesh, suspects=[*pair, (6, 3)], apart=[pair]))
    assert (second[:6] == first[:6]).all()


@given(st.integers(4, 8), st.integers(4, 9), st.integers(0, 1 << 30))
@SETTINGS
def test_one_that_is_at_odds_with_others_is_parted_from_all_of_them(stages, replicas, seed):
    """With one of a stage each, so that there is room."""
    mesh, generator = Mesh(stages, replicas), np.random.default_rng(seed)
    liar = Worker(int(generator.integers(1, stages - 1)), int(generator.integers(replicas)))
    near = [stage for stage in range(liar.stage - 2, liar.stage + 3) if 0 <= stage < stages and stage != liar.stage]
    others = [Worker(stage, int(generator.integers(replicas))) for stage in near]
    pairs = [tuple(sorted((liar, other))) for other in others]
    suspects = [worker for worker in (liar, *others) if not mesh.is_trusted(worker.stage)]
    columns = columns_of(Dealer(mesh).next(0, doubts(mesh, suspects=suspects, apart=pairs)))
    assert all(columns[one] != columns[other] for one, other in pairs)


def test_who_is_at_odds_with_two_stages_stays_apart_from_both():
    mesh = Mesh(5, 3)
    dealer, pairs = Dealer(mesh), [((1, 2), (2, 0)), ((1, 2), (3, 2))]
    about = doubts(mesh, suspects=[(1, 2), (2, 0), (3, 2)], apart=pairs)
    first = dealer.next(0, about).copy()
    columns = columns_of(first)
    assert all(columns[one] != columns[other] for one, other in pairs)
    assert all((dealer.next(step, about) == first).all() for step in range(1, 8))


def test_nothing_moves_without_suspicion_not_even_back():
    mesh = Mesh(5, 4)
    dealer = Dealer(mesh)
    assert (dealer.next(0, doubts(mesh)) == identity(mesh)).all()
    healed = dealer.next(1, doubts(mesh, convicted=[(1, 0), (2, 1)])).copy()
    assert (healed != identity(mesh)).any()
    assert all((dealer.next(step, doubts(mesh)) == healed).all() for step in range(2, 40))


@given(situations(apart=False))
@SETTINGS
def test_only_who_must_moves(situation):
    """Without suspects: the convicted outside of the lost columns, and one for each whose place it takes."""
    dealer, about, step = situation
    about = doubts(dealer._mesh, convicted=list(map(tuple, np.argwhere(about.packed))))
    before = dealer.wiring.copy()
    after = dealer.next(step, about)
    lost = by_column(about.packed, after).any(0)
    outside = np.count_nonzero(by_column(about.packed, before)[:, ~lost])
    assert np.count_nonzero(before != after) <= 2 * outside
    best = np.sort(np.count_nonzero(by_column(about.packed, before), axis=0))[::-1]
    assert outside == best[np.count_nonzero(lost) :].sum(), "no other choice of columns moves fewer"


def places_to_try(mesh, convicted):
    lost = np.count_nonzero(convicted, axis=1).max()
    return lost, min(max(1, mesh.replicas - lost - (mesh.replicas - 1) // 2 - 1), mesh.replicas - 1 - lost)


@given(situations(apart=False))
@SETTINGS
def test_suspects_get_columns_of_their_own_as_far_as_there_are_some(situation):
    dealer, about, step = situation
    mesh = dealer._mesh
    wiring = dealer.next(step, about)
    lost, tried = places_to_try(mesh, about.packed)
    a_stage = np.count_nonzero(about.suspects, axis=1)
    suspects, with_convicted = by_column(about.suspects, wiring), by_column(about.packed, wiring).any(0)
    used = suspects.any(0) & ~with_convicted
    if tried < 1:
        return
    if a_stage.max() <= tried:
        assert not suspects[:, with_convicted].any(), "nobody waits while there is room"
        assert np.count_nonzero(used) == min(tried, a_stage.sum())
    else:
        assert np.count_nonzero(used) >= tried
    free = lost - np.count_nonzero(about.packed, axis=1)
    if (a_stage <= tried + free).all():
        assert np.count_nonzero(used) <= tried
        assert (~(used | with_convicted)).any(), "a column is left without any"


def test_who_stood_behind_a_convicted_worker_is_tried():
    mesh = Mesh(6, 8)
    dealer = Dealer(mesh)
    about = doubts(mesh, convicted=[(1, 3)], suspects=[(2, 1)])
    about.untried[3, 3] = about.untried[4, 3] = True
    wiring = dealer.next(0, about).copy()
    columns = columns_of(wiring)
    assert columns[3, 3] != 3 != columns[4, 3] and columns[1, 3] == 3
    assert columns[2, 1] == 1 and (wiring[3:5, 1] == 1).all(), "not behind a suspect while there is another column"
    assert columns[3, 3] in (0, 2) and columns[4, 3] in (0, 2), "where somebody may be tried"
    about.untried[4, 3] = False
    assert (dealer.next(1, about) == wiring).all()


def test_suspects_that_are_too_many_take_turns():
    mesh = Mesh(4, 5)
    dealer = Dealer(mesh)
    about = doubts(mesh, convicted=[(2, 0), (2, 1)], suspects=[(1, replica) for replica in range(3)])
    tried = set()
    for step in range(64):
        wiring = dealer.next(step, about)
        lost = by_column(about.packed, wiring).any(0)
        here = wiring[1][~lost & by_column(about.suspects, wiring)[1]]
        assert len(here) == 1, "five less two lost less three that have to agree, at least one"
        tried |= set(here.tolist())
    assert tried == {0, 1, 2}


@pytest.mark.parametrize("replicas", [3, 4, 5, 8])
@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_at_odds_get_other_partners(replicas, distance, stage):
    mesh = Mesh(6, replicas)
    pair = (Worker(stage, 1), Worker(stage + distance, 1))
    suspects = [worker for worker in pair if not mesh.is_trusted(worker.stage)]
    dealer = Dealer(mesh)
    met = set()
    pairs = []
    for step in range(4):
        wiring = dealer.next(step, doubts(mesh, suspects=suspects, apart=[pair, *pairs]))
        columns = columns_of(wiring)
        assert columns[pair[0]] != columns[pair[1]]
        partner = Worker(pair[1].stage, int(wiring[pair[1].stage, columns[pair[0]]]))
        assert partner not in met or len(met) == replicas - 1
        met.add(partner)
        if len(met) < replicas - 1:
            pairs.append((pair[0], partner))


def test_two_at_odds_part_where_a_column_is_lost_too():
    mesh = Mesh(6, 3)
    pair = ((2, 0), (3, 0))
    dealer = Dealer(mesh)
    wiring = dealer.next(0, doubts(mesh, convicted=[(1, 2)], suspects=pair, apart=[pair]))
    columns = columns_of(wiring)
    assert columns[2, 0] != columns[3, 0] and {columns[2, 0], columns[3, 0]} == {0, columns[1, 2]}, (
        "one column is without suspects and convicted workers"
    )


@pytest.mark.parametrize(
    ("accused", "suspects", "waits"),
    [([], [(2, 0)], 1), ([(2, 1)], [(2, 0)], 0), ([], [(2, 0), (2, 1)], 1), ([(2, 0), (2, 1)], [], 1)],
)
def test_of_two_that_differed_one_is_compared_with_another(accused, suspects, waits):
    """The one that is accused, or else suspected."""
    mesh = Mesh(5, 3)
    dealer = Dealer(mesh)
    about = doubts(mesh, [(1, 2)], suspects, [((2, 0), (2, 1))], accused)
    lost = by_column(about.packed, dealer.next(0, about)).any(0)
    assert dealer.wiring[2][lost].tolist() == [waits]


def test_who_waits_does_not_hang_on_where_it_stands():
    """Else the two would change places for ever."""
    mesh = Mesh(5, 3)
    dealer = Dealer(mesh)
    about = doubts(mesh, [(1, 2)], [(2, 0), (2, 1)], [((2, 0), (2, 1))])
    dealer.load_state_dict({"wiring": np.array([[0, 1, 2], [0, 1, 2], [1, 2, 0], [0, 1, 2], [0, 1, 2]])})
    lost = by_column(about.packed, dealer.next(0, about)).any(0)
    assert dealer.wiring[2][lost].tolist() == [1]


def test_who_differed_from_two_lets_them_be_compared():
    mesh = Mesh(5, 3)
    dealer = Dealer(mesh)
    everybody = [(2, replica) for replica in range(3)]
    about = doubts(mesh, convicted=[(1, 2)], suspects=everybody, apart=[((2, 0), (2, 1)), ((2, 1), (2, 2))])
    lost = by_column(about.packed, dealer.next(0, about)).any(0)
    assert dealer.wiring[2][lost].tolist() == [1]


def test_the_worked_example_of_the_docstring():
    mesh = Mesh(5, 4)
    dealer = Dealer(mesh)
    wiring = dealer.next(0, doubts(mesh, convicted=[(1, 0), (2, 1)], suspects=[(3, 2)]))
    assert wiring.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_shuffled_columns_are_dealt_every_so_many_steps():
    mesh = Mesh(5, 4)
    dealer, other = (Dealer(mesh, "shuffle", shuffle_every=3, seed=1) for _ in range(2))
    nobody, dealt = doubts(mesh), []
    for step in range(30):
        dealt.append(dealer.next(step, nobody).tobytes())
        check_wiring(mesh, dealer.wiring)
    assert all(dealt[step] == dealt[step + 1] for step in range(29) if (step + 2) % 3)
    assert len(set(dealt)) > 8
    assert other.next(29, nobody).tobytes() == dealt[29], "it hangs on the step alone"
    assert Dealer(mesh, "shuffle", 3, seed=2).next(29, nobody).tobytes() != dealt[29]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_shuffled_columns_heal_too(seed, every):
    """Convicted workers that were drawn into all columns would leave no step to train in."""
    mesh, generator = Mesh(8, 8), np.random.default_rng(seed)
    convicted = [(stage, int(bad)) for stage in range(1, 7) for bad in generator.choice(8, 2, replace=False)]
    dealer, about = Dealer(mesh, "shuffle", every, seed=seed), doubts(mesh, convicted=convicted)
    for step in range(6):
        wiring = dealer.next(step, about)
        check_wiring(mesh, wiring)
        lost = np.take_along_axis(about.packed, wiring, 1).any(0)
        assert lost.sum() == 2


@pytest.mark.parametrize(
    ("block", "moves"), [({}, True), ({"action": "observe"}, False), ({"wiring": "static"}, False)]
)
def test_columns_heal_by_default_and_stay_where_nobody_is_to_act(block, moves):
    mesh = Mesh(4, 3)
    dealer = Dealer.of(SentinelConfig.parse(block).of_mesh(mesh), mesh)
    dealer.next(0, doubts(mesh, convicted=[(1, 0), (2, 1)]))
    assert (dealer.wiring != identity(mesh)).any() == moves


@pytest.mark.parametrize(
    ("wiring", "said"),
    [
        (np.array([[1, 0], [0, 1], [0, 1]]), "first and last stage"),
        (identity(Mesh(3, 2)) + 0.0, "whole numbers, got float64"),
        (identity(Mesh(3, 2)) + 0.25, "whole numbers, got float64"),
        (identity(Mesh(3, 2)).astype(bool), "whole numbers, got bool"),
        (identity(Mesh(3, 2)) + 1j, "whole numbers, got complex128"),
        ([[0, 1], [10**40, 0], [0, 1]], "whole numbers, got object"),
        (identity(Mesh(3, 2)).astype(np.uint64) + np.uint64(1 << 63), "every replica once"),
        ([[0, 1], [0], [0, 1]], "inhomogeneous"),
    ],
)
def test_no_wiring_of_the_mesh_is_refused(wiring, said):
    dealer = Dealer(Mesh(3, 2))
    with pytest.raises(ValueError, match=said):
        dealer.load_state_dict({"wiring": wiring})
    assert (dealer.wiring == identity(Mesh(3, 2))).all()


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.uint64])
def test_a_wiring_of_whole_numbers_is_taken_up(kind):
    dealer = Dealer(Mesh(3, 2))
    dealer.load_state_dict({"wiring": np.array([[0, 1], [1, 0], [0, 1]], kind)})
    assert dealer.wiring.dtype == np.int64 and dealer.wiring[1].tolist() == [1, 0]
