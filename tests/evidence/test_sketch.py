import numpy as np
import pytest
import torch
from everybody import MESH, pair_sketches, sketch_at

from deepspeed_sentinel.evidence.buffers import PUBLIC
from deepspeed_sentinel.evidence.probe import SECRET
from deepspeed_sentinel.evidence.renewal import LEAD, PERIOD, READY, Renewal
from deepspeed_sentinel.evidence.sketch import _pack, _unpack
from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.evidence.transfer import FRESH, LASTING, NEXT, Sketches, Transfers, pair_rows
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker, identity

BETWEEN = (1, 2, 3)


@pytest.fixture
def everybody():
    return pair_sketches(MESH)


def secret(pairs, end, step=3):
    return pairs.seeds(step, public_seed=0)[end][SECRET:].tolist()


def test_the_neighbours_of_a_stage_look_at_the_same_tokens_in_the_same_directions(everybody):
    for stage in BETWEEN:
        for column in range(3):
            below, above = everybody[Worker(stage - 1, column)], everybody[Worker(stage + 1, column)]
            assert secret(below, (FORWARD, SENT)) == secret(above, (FORWARD, RECEIVED))
            assert secret(below, (BACKWARD, RECEIVED)) == secret(above, (BACKWARD, SENT))


def test_no_secret_serves_two_columns_stages_directions_or_steps(everybody):
    samples, projections, lasting = set(), set(), set()
    for stage in BETWEEN:
        for column in range(3):
            for end in ((FORWARD, SENT), (BACKWARD, RECEIVED)):
                for step in (3, 4):
                    (sample, fresh), (same, kept) = secret(everybody[Worker(stage - 1, column)], end, step)
                    assert sample == same, "all projections are of one sample, and so are its norms"
                    samples.add(sample)
                    projections.add(fresh)
                    lasting.add(kept)
    assert len(samples) == len(projections) == 3 * 3 * 2 * 2
    assert len(lasting) == 3 * 3 * 2 and not lasting & projections


def test_a_stage_and_other_columns_hold_none_of_a_pairs_secrets(everybody):
    for stage in BETWEEN:
        for column in range(3):
            about = {n for end in PAIR for row in secret(everybody[Worker(stage - 1, column)], end) for n in row}
            for worker, pairs in everybody.items():
                held = {number for end in pairs.ends for row in secret(pairs, end) for number in row}
                is_neighbour = worker.replica == column and abs(worker.stage - stage) == 1
                assert bool(held & about) == is_neighbour, (worker, stage, column)


PAIR = ((FORWARD, SENT), (BACKWARD, RECEIVED))


def test_both_ends_of_a_link_share_the_public_row(everybody):
    rows = {tuple(seeds[PUBLIC].tolist()) for p in everybody.values() for seeds in p.seeds(3, public_seed=0).values()}
    assert rows == {(0, 0)}


def test_the_outermost_stages_have_one_pair_each(everybody):
    assert set(everybody[Worker(0, 0)].ends) == {(FORWARD, SENT), (BACKWARD, RECEIVED)}
    assert set(everybody[Worker(4, 0)].ends) == {(FORWARD, RECEIVED), (BACKWARD, SENT)}
    assert len(everybody[Worker(2, 0)].ends) == 4
    assert pair_sketches(Mesh(2, 1))[Worker(0, 0)].ends == ()


def test_after_a_restart_what_is_looked_at_is_another(everybody):
    before = secret(everybody[Worker(1, 0)], (FORWARD, SENT))
    for pairs in everybody.values():
        pairs.forget()
    after = secret(everybody[Worker(1, 0)], (FORWARD, SENT))
    assert after == secret(everybody[Worker(3, 0)], (FORWARD, RECEIVED))
    assert after[FRESH] == before[FRESH] and after[LASTING][1] != before[LASTING][1]


def test_a_renewal_leaves_no_step_without_prediction_and_both_neighbours_see_the_same(everybody):
    below, above = everybody[Worker(1, 0)], everybody[Worker(3, 0)]
    ends = (FORWARD, SENT), (FORWARD, RECEIVED)
    knowledge = Transfers(0.9, 0.8), Transfers(0.9, 0.8)
    generator = torch.Generator().manual_seed(0)
    stage_DD = 0.05 * torch.randn(96, 96, generator=generator)
    lasting, correlations, ahead = [], [], 0
    for pairs in (below, above):
        pairs.renewal = Renewal(np.full((2, 5, 3), PERIOD - 2 * LEAD - 1))
    for step in range(3 * LEAD):
        entering = torch.randn(1, 150, 96, generator=generator)
        leaving = entering + entering @ stage_DD
        told = []
        for pairs, end, transfers in zip((below, above), ends, knowledge, strict=True):
            known = transfers.known(end) if pairs.ready(end) else None
            sketches = sketch_at(below, ends[0], step, entering), sketch_at(above, ends[1], step, leaving)
            rows, lessons = pair_rows(*sketches, known)
            told.append(rows)
            for which, lesson in enumerate(lessons, LASTING):
                transfers.learn(end, lesson.mean(0), np.array(True), which)
        assert torch.equal(told[0].nan_to_num(9.0), told[1].nan_to_num(9.0)), step
        seeds = secret(below, ends[0], step)
        ahead += len(seeds) > NEXT
        lasting.append(seeds[LASTING][1])
        assert lasting[-1] == secret(above, ends[1], step)[LASTING][1]
        correlations.append(float(told[0][0, -2]))
        for pairs, end, transfers in zip((below, above), ends, knowledge, strict=True):
            change = pairs.learn(np.ones((2, 4, 3), bool))[end]
            transfers.renew(end, change.renewed, change.stale)
    assert np.isnan(correlations[:READY]).all() and not np.isnan(correlations[READY:]).any()
    assert len(set(lasting)) == 2 and ahead == LEAD, "the projection was renewed, and sketched before"
    renewed = lasting.index(lasting[-1])
    steady = correlations[renewed - LEAD : renewed]
    assert min(correlations[renewed : renewed + 3]) > min(steady) - 0.05


def test_what_a_partner_sends_cannot_make_statistics_unavailable():
    honest = Sketches(torch.randn(2, 3, 8, 64), torch.rand(3, 8), torch.full((3,), 8.0))
    lie = Sketches(honest.sketch_JXmK.clone(), honest.norms_Xm.clone(), honest.tokens_X)
    lie.sketch_JXmK[:, 1, 2, 5], lie.norms_Xm[2] = float("nan"), float("inf")
    heard = _unpack(_pack(lie), honest)
    assert heard.sketch_JXmK.isfinite().all() and heard.norms_Xm.isfinite().all()
    rows, _ = pair_rows(honest, heard, None)
    assert rows[:, [0, 1, 2, 4]].isfinite().all()
    same = _unpack(_pack(honest), honest)
    assert torch.equal(same.sketch_JXmK, honest.sketch_JXmK) and torch.equal(same.norms_Xm, honest.norms_Xm)


MOVED = np.array([[0, 1, 2], [0, 1, 2], [1, 0, 2], [1, 2, 0], [0, 1, 2]])


@pytest.mark.parametrize("back", [False, True])
def test_pairs_go_by_the_wiring(everybody, back):
    """Also by the one of before, which they come back to."""
    wirings = [MOVED, identity(MESH)] if back else [MOVED]
    before = {worker: {end: secret(pairs, end) for end in pairs.ends} for worker, pairs in everybody.items()}
    for wiring in wirings:
        parted = {worker: pairs.wire(wiring) for worker, pairs in everybody.items()}
    for column, (below, *_, above) in enumerate(wiring.T):
        for stage in BETWEEN:
            below, above = (Worker(at, wiring[at, column]) for at in (stage - 1, stage + 1))
            for mine, theirs in (((FORWARD, SENT), (FORWARD, RECEIVED)), ((BACKWARD, RECEIVED), (BACKWARD, SENT))):
                shared = secret(everybody[below], mine)
                assert shared == secret(everybody[above], theirs), "the two of a column sketch the same tokens"
                moved = (MOVED[[stage - 1, stage + 1], column] != column).any()
                assert parted[below][mine] == parted[above][theirs] == moved
                assert (shared[LASTING][1] == before[below][mine][LASTING][1]) == (not moved), (
                    "learnt anew where parted"
                )
    told = [pairs.renewal for pairs in everybody.values()]
    for renewal in told:
        for name in ("new_X", "epoch_X", "ready_X"):
            assert (getattr(renewal, name) == getattr(told[0], name)).all(), "all ranks count alike"
    # Around stage 1 the columns 0 and 1, around 2 all three, around 3 the columns 0 and 1.
    expected = np.array([[0, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)
    assert (told[0].new_X == expected).all()


def test_two_that_meet_in_another_column_share_other_secrets(everybody):
    """Workers (1, 0) and (3, 0) move together to column 1."""
    wiring = identity(MESH)
    wiring[[1, 3]] = [1, 0, 2]
    together = everybody[Worker(1, 0)]
    before = secret(together, (FORWARD, SENT))
    parted = together.wire(wiring)
    after = secret(together, (FORWARD, SENT))
    assert parted[FORWARD, SENT] and {n for row in before for n in row}.isdisjoint(n for row in after for n in row)
