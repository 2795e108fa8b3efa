"""The seam to DeepSpeed's point-to-point module: which ranks it finds, and what both ends of a new link forget."""

from types import SimpleNamespace

import numpy as np
import pytest
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sentinel.engine.wiring import column_ranks, neighbours, reopen_links
from deepspeed_sentinel.mesh import Mesh, Worker, identity

MESH = Mesh(4, 3)
RANKS = np.arange(12).reshape(4, 3)
WORKERS = [Worker(stage, replica) for stage in range(4) for replica in range(3)]


class Grid:
    """As much of DeepSpeed's as its point-to-point module asks."""

    pipe_parallel_size = 4

    def __init__(self, rank):
        self._topology, self._rank = PipeDataParallelTopology(4, 3), rank

    def get_stage_id(self):
        return self._topology.get_coord(self._rank).pipe

    def stage_to_global(self, stage_id):
        return self._topology.get_rank(pipe=stage_id, data=self._topology.get_coord(self._rank).data)


@pytest.fixture
def sent(monkeypatch):
    """Ranks that the point-to-point module of a rank sends to, and its grid outside of a schedule."""
    to = []
    monkeypatch.setattr(p2p.dist, "send", lambda tensor, rank: to.append(rank))
    monkeypatch.setattr(p2p, "_grid", "another engine's")
    return to


def test_messages_go_to_the_column_that_a_worker_serves_and_the_grid_comes_back(sent):
    wiring = identity(MESH)
    wiring[1], wiring[2] = [1, 0, 2], [2, 1, 0]
    # Worker (1, 0) serves column 1, whose others are (0, 1), (2, 1) and (3, 1).
    engine = SimpleNamespace(grid=Grid(3))
    with neighbours(engine, column_ranks(wiring, RANKS, Worker(1, 0))):
        p2p.send(None, 0)
        p2p.send(None, 2)
    assert sent == [1, 7] and p2p._grid == "another engine's"
    with pytest.raises(KeyError), neighbours(engine, [0, 3, 6, 9]):
        raise KeyError
    assert p2p._grid == "another engine's", "an error gives it back too"


def test_the_identity_is_deepspeeds_own():
    for rank, worker in enumerate(WORKERS):
        grid = Grid(rank)
        assert column_ranks(identity(MESH), RANKS, worker) == [grid.stage_to_global(stage) for stage in range(4)]


def wirings():
    rows = st.permutations(range(3))
    return st.tuples(rows, rows).map(lambda two: np.array([[0, 1, 2], *two, [0, 1, 2]]))


@given(wirings(), wirings())
def test_both_ends_of_a_link_forget_it_together_and_only_where_it_is_another(before, wiring):
    engines = {}
    for worker in WORKERS:
        engine = SimpleNamespace(first_output_send=False, grad_layer="buffers", pipe_recv_buf="buffers")
        reopen_links(engine, before, wiring, worker)
        engines[worker] = engine
    for column in range(3):
        was = [Worker(stage, before[stage, column]) for stage in range(4)]
        now = [Worker(stage, wiring[stage, column]) for stage in range(4)]
        for link in range(3):
            sender, receiver = engines[now[link]], engines[now[link + 1]]
            new = was[link : link + 2] != now[link : link + 2]
            assert sender.first_output_send == (receiver.pipe_recv_buf is None) == (sender.grad_layer is None) == new
    for replica in range(3):  # the ends of the pipeline have one link each
        assert engines[Worker(0, replica)].pipe_recv_buf and not engines[Worker(3, replica)].first_output_send
