import numpy as np
import pytest

from deepspeed_sentinel.mesh import Mesh, changed_links, check_wiring, columns_of, identity

MESH = Mesh(4, 3)


def test_columns_are_the_other_way_round():
    wiring = identity(MESH)
    wiring[1], wiring[2] = [2, 0, 1], [1, 0, 2]
    check_wiring(MESH, wiring)
    columns = columns_of(wiring)
    assert all(wiring[stage, columns[stage, replica]] == replica for stage in range(4) for replica in range(3))
    assert (columns_of(identity(MESH)) == identity(MESH)).all()


@pytest.mark.parametrize(
    ("row", "values", "said"),
    [(1, [0, 0, 2], "every replica once"), (0, [1, 0, 2], "never move"), (3, [2, 1, 0], "never move")],
)
def test_what_is_no_wiring_is_refused(row, values, said):
    wiring = identity(MESH)
    wiring[row] = values
    with pytest.raises(ValueError, match=said):
        check_wiring(MESH, wiring)


def test_another_mesh_has_another_shape():
    with pytest.raises(ValueError, match=r"\[4, 3\].*got \[3, 3\]"):
        check_wiring(MESH, np.zeros((3, 3), np.int64))


def test_a_link_has_changed_where_one_of_its_two_workers_has():
    before = identity(Mesh(4, 3))
    after = before.copy()
    after[1] = [2, 1, 0]
    assert changed_links(before, after).tolist() == [[True, False, True], [True, False, True], [False] * 3]
    assert not changed_links(after, after).any()
