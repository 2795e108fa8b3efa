import numpy as np
import pytest
import torch

from deepspeed_sentinel.evidence.probe import PUBLIC, SECRET
from deepspeed_sentinel.evidence.sketch import PairSketches
from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker

MESH = Mesh(5, 2)
RANKS = np.arange(10).reshape(5, 2)


@pytest.fixture(scope="module")
def everybody():
    return {
        Worker(stage, replica): PairSketches(MESH, Worker(stage, replica), RANKS, torch.device("cpu"), 7, None)
        for stage in range(5)
        for replica in range(2)
    }


def secret(pairs, end, step=3):
    return tuple(pairs.seeds(step, public_seed=0)[end][SECRET].tolist())


def test_the_neighbours_of_a_stage_look_at_the_same_tokens_in_the_same_directions(everybody):
    for stage in (1, 2, 3):
        for column in range(2):
            below, above = everybody[Worker(stage - 1, column)], everybody[Worker(stage + 1, column)]
            assert secret(below, (FORWARD, SENT)) == secret(above, (FORWARD, RECEIVED))
            assert secret(below, (BACKWARD, RECEIVED)) == secret(above, (BACKWARD, SENT))


def test_samples_differ_by_column_and_step_projections_by_stage_alone(everybody):
    projections = set()
    for stage in (1, 2, 3):
        one, other = (everybody[Worker(stage - 1, column)] for column in range(2))
        (sample, projection), (other_sample, other_projection) = (secret(p, (FORWARD, SENT)) for p in (one, other))
        assert projection == other_projection and sample != other_sample
        assert secret(one, (FORWARD, SENT), step=4)[0] != sample
        assert secret(one, (FORWARD, SENT), step=4)[1] == projection
        projections.add(projection)
    assert len(projections) == 3


def test_a_stage_holds_none_of_the_secrets_about_itself(everybody):
    about = {stage: set(secret(everybody[Worker(stage - 1, 0)], (FORWARD, SENT))) for stage in (1, 2, 3)}
    for stage in (1, 2, 3):
        pairs = everybody[Worker(stage, 0)]
        held = {number for end in pairs.ends for number in secret(pairs, end)}
        assert not held & about[stage]


def test_both_ends_of_a_link_share_the_public_row(everybody):
    rows = {tuple(seeds[PUBLIC].tolist()) for p in everybody.values() for seeds in p.seeds(3, public_seed=0).values()}
    assert rows == {(0, 0)}


def test_the_outermost_stages_have_one_pair_each(everybody):
    assert set(everybody[Worker(0, 0)].ends) == {(FORWARD, SENT), (BACKWARD, RECEIVED)}
    assert set(everybody[Worker(4, 0)].ends) == {(FORWARD, RECEIVED), (BACKWARD, SENT)}
    assert len(everybody[Worker(2, 0)].ends) == 4
    two = Mesh(2, 1)
    assert PairSketches(two, Worker(0, 0), np.array([[0], [1]]), torch.device("cpu"), 7, None).ends == ()


def test_projections_travel_in_checkpoints(everybody):
    other = PairSketches(MESH, Worker(2, 0), RANKS, torch.device("cpu"), 8, None)
    assert other.projections != everybody[Worker(2, 0)].projections
    other.load_state_dict(everybody[Worker(2, 0)].state_dict())
    assert other.projections == everybody[Worker(2, 0)].projections
