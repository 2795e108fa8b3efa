"""When a wiring takes effect, and what of it is kept in checkpoints."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine.columns import Columns
from deepspeed_sentinel.judgement.doubts import Doubts
from deepspeed_sentinel.mesh import Mesh, columns_of, identity

MESH = Mesh(4, 3)
NOBODY = np.zeros((4, 3), bool)


class Engine:
    """Of worker (1, 1): as much of DeepSpeed's as is asked for its place in the mesh."""

    first_output_send, grad_layer, pipe_recv_buf, global_steps = False, "buffers", "buffers", 7

    def __init__(self):
        self._topology = PipeDataParallelTopology(4, 3)
        self.grid = SimpleNamespace(
            pipe_parallel_size=4,
            data_parallel_size=3,
            topology=lambda: self._topology,
            get_stage_id=lambda: 1,
            get_data_parallel_id=lambda: 1,
        )


@pytest.fixture
def told():
    """What evidence went by from a step on, and what was told."""
    return SimpleNamespace(wired=[], moves=[], own=0)


def columns(told, **block):
    config = SentinelConfig.parse({"enabled": True, **block}).of_mesh(MESH)

    def own_wiring():
        told.own += 1

    telling = SimpleNamespace(wiring=lambda *what: told.moves.append(what), own_wiring=own_wiring)
    return Columns(Engine(), config, SimpleNamespace(wire=told.wired.append), telling)


def doubts(*convicted):
    return Doubts(
        np.isin(np.arange(12).reshape(4, 3), [3 * one[0] + one[1] for one in convicted]), NOBODY, NOBODY, NOBODY
    )


def test_a_wiring_takes_effect_with_the_next_schedule_and_not_before(told):
    here = columns(told)
    before = p2p._grid
    dealt = here.deal(7, doubts((1, 1), (2, 0)))
    assert (dealt != identity(MESH)).any() and (here.wiring == identity(MESH)).all() and not told.wired
    assert (here.of(7) == identity(MESH)).all() and (here.of(8) == dealt).all(), "whoever is a step ahead goes by it"
    with here.in_effect():
        column = columns_of(dealt)[1, 1]
        assert p2p._grid.stage_to_global(stage_id=2) == 6 + dealt[2, column]
    assert p2p._grid is before and here.own == column
    assert len(told.wired) == 1 and (told.wired[0] == dealt).all() and [step for step, *_ in told.moves] == [7]
    with here.in_effect():
        assert len(told.wired) == len(told.moves) == 1, "only where somebody moves"


def test_nothing_is_told_and_nothing_rebuilt_while_nobody_is_suspected(told):
    here = columns(told)
    for step in range(3):
        here.deal(step, doubts())
        with here.in_effect():
            assert (here.wiring == identity(MESH)).all()
    assert not told.wired and not told.moves


def test_the_engine_gets_deepspeeds_own_back(told):
    here = columns(told)
    here.deal(7, doubts((1, 1), (2, 0)))
    with here.in_effect():
        pass
    here.give_back()
    assert (here.wiring == identity(MESH)).all() and (told.wired[-1] == identity(MESH)).all()
    assert len(told.moves) == 1, "the end of watching is no healing"


def saved(told):
    here = columns(told)
    here.deal(7, doubts((1, 1), (2, 0)))
    return here.state_dict(), here.of(8)


def test_a_saved_wiring_takes_effect_with_the_first_schedule(told):
    state, wiring = saved(told)
    resumed = columns(told)
    assert resumed.problem(state) is None
    resumed.load_state_dict(state)
    with resumed.in_effect():
        assert (resumed.wiring == wiring).all()
    assert not told.own


def test_where_nobody_may_be_moved_a_saved_wiring_is_told_of_and_not_taken(told):
    state, _ = saved(told)
    static = columns(told, wiring="static")
    static.load_state_dict(state)
    with static.in_effect():
        assert (static.wiring == identity(MESH)).all()
    assert told.own == 1
    static.load_state_dict({"wiring": identity(MESH)})
    assert told.own == 1, "DeepSpeed's own is none to speak of"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "has no wiring"),
        ({}, "has a wiring that cannot be"),
        ({"wiring": "none"}, "has a wiring that cannot be"),
        ({"wiring": np.zeros((4, 3), np.int64)}, "names every replica once"),
        ({"wiring": identity(Mesh(4, 2))}, r"is \[4, 3\]"),
        ({"wiring": identity(MESH)[:, ::-1]}, "never move"),
        ({"wiring": identity(MESH) + 0.5}, "whole numbers, got float64"),
        ({"wiring": [[10**40, 0, 0]] * 4}, "whole numbers, got object"),
        ({"wiring": torch.zeros(4, 3, dtype=torch.bfloat16)}, "has a wiring that cannot be"),
    ],
)
def test_what_is_no_wiring_is_told_in_words(told, state, said):
    assert re.search(said, columns(told).problem(state))


def test_who_only_observes_moves_nobody(told):
    here = columns(told, action="observe")
    assert (here.deal(7, doubts((1, 1), (2, 0))) == identity(MESH)).all()


def test_who_only_observes_from_now_on_goes_by_deepspeeds_own_wiring_until_others_are_moved_again(told):
    here = columns(told)
    dealt = here.deal(7, doubts((1, 1), (2, 0)))
    with here.in_effect():
        assert (here.wiring == dealt).all()
    given = SentinelConfig.parse({"enabled": True})
    here.go_by(given.with_action("observe", MESH))
    assert (here.wiring == dealt).all(), "the step is not over"
    with here.in_effect():
        assert (here.wiring == identity(MESH)).all()
    assert (here.deal(8, doubts((1, 1), (2, 0))) == identity(MESH)).all()
    here.go_by(given.with_action("quarantine", MESH))
    assert (here.deal(9, doubts((1, 1), (2, 0))) != identity(MESH)).any()
    assert len(told.wired) == 2 and not told.own


def test_a_wiring_stays_where_the_new_action_heals_too(told):
    here = columns(told)
    dealt = here.deal(7, doubts((1, 1), (2, 0)))
    here.go_by(SentinelConfig.parse({"enabled": True}).with_action("exclude", MESH))
    with here.in_effect():
        assert (here.wiring == dealt).all()
