"""Columns are dealt fairly, to those who are not convicted."""

import numpy as np

from deepspeed_sentinel.mesh import Mesh
from deepspeed_sentinel.simulation.routing import deal_columns, draw_attackers

MESH = Mesh(5, 6)


def test_everybody_serves_one_column_and_the_ends_stay_put():
    convicted = np.zeros((5, 6), bool)
    deals = [deal_columns(MESH, convicted, 0, step) for step in range(50)]
    for served in deals:
        assert all(sorted(row) == list(range(6)) for row in served.tolist())
        assert (served[[0, -1]] == np.arange(6)).all()
    assert len({deal[2].tobytes() for deal in deals}) > 40, "dealt anew in every step"
    assert (deals[7] == deal_columns(MESH, convicted, 0, 7)).all()
    assert (deals[7] != deal_columns(MESH, convicted, 1, 7)).any()


def test_a_convicted_workers_share_goes_to_the_others_of_its_stage():
    convicted = np.zeros((5, 6), bool)
    convicted[2, [1, 4]] = True
    counts = np.zeros(6, int)
    for step in range(60):
        row = deal_columns(MESH, convicted, 0, step)[2]
        assert not set(row.tolist()) & {1, 4}
        served = np.bincount(row, minlength=6)
        assert served.max() == 2, "as evenly as can be"
        counts += served
    assert (counts[[0, 2, 3, 5]] > 60).all(), "all of them take over"


def test_with_all_of_a_stage_convicted_all_serve():
    convicted = np.zeros((5, 6), bool)
    convicted[3] = True
    assert sorted(deal_columns(MESH, convicted, 0, 0)[3].tolist()) == list(range(6))


def test_attackers_are_drawn_from_the_middle_stages():
    drawn = draw_attackers(MESH, 2, seed=3)
    assert drawn.sum(1).tolist() == [0, 2, 2, 2, 0]
    assert (drawn == draw_attackers(MESH, 2, seed=3)).all()
    assert (drawn != draw_attackers(MESH, 2, seed=4)).any()
