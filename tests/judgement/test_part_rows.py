"""Messages of two judged parts: each is held against fences of its own, and findings say which one it was."""

import warnings

import numpy as np
import pytest
from synthetic import World, settings

from deepspeed_sentinel.evidence.table import NAMES, TABLE, Rows, comparable
from deepspeed_sentinel.judgement.judge import Judge
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Worker

K = len(TABLE)
ENERGY, SLOPE = NAMES.index("energy"), NAMES.index("prediction_slope")


class TwoParts(World):
    """A second part, far smaller, and on the first link none."""

    def __init__(self, stages=5, replicas=3, **changes):
        super().__init__(stages, replicas, **changes)
        self.judge = Judge(self.mesh, settings(**changes), parts=2)

    def statistics(self):
        hidden, second = super().statistics(), super().statistics()
        second[..., ENERGY] *= 1e-6
        second[:, :, 0] = np.nan
        return np.concatenate([hidden, second], axis=-1)


def warmed():
    world = TwoParts()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(verdict.findings or verdict.disputed for verdict in world.warm_up(60))
    return world


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("row", [ENERGY, SLOPE])
def test_each_part_is_judged(part, row):
    world = warmed()

    def change(values):
        values[:, FORWARD, 2, 1, :, part * K + row] *= 30

    (finding,) = world.step(change).findings
    assert finding.worker == Worker(2, 1) and finding.statistic == NAMES[row] and finding.part == part
    assert finding.rests_on_pair == (row == SLOPE) and f"{NAMES[row]} of part {part} = " in str(finding)


def test_nan_in_the_second_part_alone_is_an_alarm():
    def change(values):
        values[:, BACKWARD, 2, 1, 0, K + NAMES.index("non_finite")] = 1

    (finding,) = TwoParts().step(change).findings
    assert finding.worker == Worker(3, 1) and (finding.part, finding.statistic) == (1, "non_finite")


def test_a_message_of_one_part_has_no_part_to_name():
    world = World(4, 3)
    world.warm_up()

    def change(values):
        values[:, FORWARD, 1, 1, :, ENERGY] *= 30

    (finding,) = world.step(change).findings
    assert finding.part is None and "part" not in str(finding)
    assert "energy = " in str(finding) and " (mean square of all values), score " in str(finding)


def test_a_gradient_is_zero_only_if_all_its_parts_are():
    world = warmed()

    def change(values):
        values[:, BACKWARD, :, 1, 1, NAMES.index("max_abs")] = 0.0

    assert world.step(change).findings, "the second part is not"


def test_rows_stand_part_by_part():
    rows = Rows(2)
    assert len(rows) == 2 * K and rows.part(K + 3) == 1 and rows.name(K + 3) == NAMES[3]
    assert np.flatnonzero(rows.hard).tolist() == [*np.flatnonzero(Rows(1).hard), *K + np.flatnonzero(Rows(1).hard)]
    values = np.random.default_rng(0).uniform(0.1, 0.9, (2, K, 5))
    np.testing.assert_array_equal(comparable(values.reshape(2 * K, 5)), np.concatenate([*map(comparable, values)]))
    assert np.arange(2 * K)[rows.all_of("energy")].tolist() == [ENERGY, K + ENERGY]
