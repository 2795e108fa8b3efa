"""Whoever becomes a suspect, there is something in that step's verdict that says why."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import World

from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Worker, identity, workers_of
from deepspeed_sentinel.telemetry.suspicion import suspicion

STAGES, REPLICAS = 5, 3
ENERGY, NON_FINITE, SLOPE = (NAMES.index(name) for name in ("energy", "non_finite", "prediction_slope"))
CAUSES = ("given the same", "other contents", "entered and left", "outside the fences", "NaN", "conviction ran out")


class Trouble:
    """What happens in one step, drawn: nothing mostly, else one or two troubles anywhere."""

    def __init__(self, generator):
        self.draw = generator
        self.troubles = [self._place() for _ in range(generator.integers(3))] if generator.random() < 0.5 else []
        self.twins = generator.random() < 0.3

    def _place(self):
        kind = self.draw.choice(["alarm", "nan", "ends", "neighbours", "twins"])
        return kind, int(self.draw.integers(2)), int(self.draw.integers(1, STAGES - 2)), int(self.draw.integers(3))

    def change(self, values):
        for kind, *where in self.troubles:
            if kind == "alarm":
                values[(slice(None), *where, slice(None), ENERGY)] *= 50
            elif kind == "nan":
                values[(slice(None), *where, slice(None), NON_FINITE)] = 3
            elif kind == "neighbours":
                values[(1, *where, slice(None), SLOPE)] += 9

    def mark(self, digests):
        digests[:] = 7
        for number, (kind, *where) in enumerate(self.troubles):
            if kind == "ends":
                digests[(1, *where)] = 8 + number
            elif kind == "twins":
                digests[(slice(None), *where)] = 20 + number

    def same(self):
        shape = (STAGES, REPLICAS)
        if not self.twins:
            return None
        return Twins(0, np.ones(REPLICAS, bool), np.ones(shape, np.int64), np.ones(shape), np.zeros(shape, np.int64))


def wiring_of(generator):
    wiring = identity(World(STAGES, REPLICAS).mesh)
    for stage in range(1, STAGES - 1):
        wiring[stage] = generator.permutation(REPLICAS)
    return wiring


@pytest.mark.parametrize("conviction", ["proof", "statistics"])
def test_every_suspect_has_a_cause_in_its_step(conviction):
    seen = Counter()
    for seed in range(2):
        world = World(STAGES, REPLICAS, conviction=conviction, action="quarantine", wiring="heal", probation_steps=25)
        world.warm_up()
        generator = np.random.default_rng(seed)
        known = np.zeros((STAGES, REPLICAS), bool)
        for _ in range(60):
            trouble = Trouble(generator)
            verdict = world.step(trouble.change, trouble.mark, served=wiring_of(generator), twins=trouble.same())
            for worker in workers_of(verdict.suspects & ~known):
                why = suspicion(verdict, worker)
                (cause,) = [cause for cause in CAUSES if cause in why] or pytest.fail(f"{verdict.step} {worker}: {why}")
                seen[cause] += 1
            known = verdict.suspects
    assert set(seen) == set(CAUSES), seen


def test_who_made_other_things_of_the_same_is_named_though_another_is_left_out_for_it():
    """Two are left to compare, one of them suspected by its own statistics: the other is told with whom it differs."""
    world = World(4, 3, conviction="proof", action="quarantine", wiring="heal")
    world.warm_up()
    shape = (4, 3)
    twins = Twins(0, np.ones(3, bool), np.ones(shape, np.int64), np.ones(shape), np.zeros(shape, np.int64))
    one, other = Worker(2, 0), Worker(2, 2)

    def alarm(values):
        values[:, FORWARD, 2, 0, :, ENERGY] *= 50

    def marks(digests):
        digests[:] = 7
        digests[:, FORWARD, 1:, 1] = digests[:, BACKWARD, :, 1] = 8  # column 1 is lost behind stage 1
        digests[:, FORWARD, 2, 0] = digests[:, BACKWARD, :, 0] = 9

    assert world.step(alarm).suspects[one]
    verdict = world.step(digests=marks, twins=twins)
    assert verdict.suspects[other] and [difference.workers for difference in verdict.differences] == [(one,)]
    assert f"given the same micro-batches, it made something else than {one}" in suspicion(verdict, other)
    assert str(verdict.differences[0]).startswith(
        f"given the same micro-batches, {one} made other forward messages than"
    )
