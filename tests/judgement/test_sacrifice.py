"""A bad worker that goes on after its conviction leaves fewer to compare: nobody behind it escapes for that."""

import numpy as np
import pytest
from synthetic import World
from test_proof import Step

from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Worker, columns_of, identity
from deepspeed_sentinel.response.dealing import Dealer

STEPS, SETTLED = 120, 60


def another_kind(step, worker, column, number):
    """It says that it runs on hardware of its own, and sends what no hardware makes."""
    step.kinds[worker] = 9
    step.sends(worker.stage, column, FORWARD, number)
    return FORWARD, worker.stage, column, 1.02


def another_kind_reported_as_near(step, worker, column, number):
    """The same, and of the two ends its own reports what the others send."""
    return (*another_kind(step, worker, column, number)[:3], np.array([1.0, 1.02])[:, None, None])


def forges(step, worker, column, number):
    step.forges(worker.stage, column, FORWARD, number)


def forges_gradients(step, worker, column, number):
    step.forges(worker.stage, column, BACKWARD, number)


def reports_other_contents(step, worker, column, number):
    step.misreports(FORWARD, worker.stage - 1, column, number)


def sends(step, worker, column, number):
    step.sends(worker.stage, column, FORWARD, number)


class Run:
    """Twin steps and others of the real judge and dealer, in which each bad worker does one thing in every step."""

    def __init__(self, replicas, bad, seed=0, stages=4):
        how = {"conviction": "proof", "action": "quarantine", "wiring": "heal", "probation_steps": 1000}
        self.world = World(stages=stages, replicas=replicas, micro_batches=2, **how)
        self.world.warm_up(30)
        self.mesh, self.bad = self.world.mesh, bad
        self.dealer, self.generator = Dealer(self.mesh), np.random.default_rng(seed)
        self.skipped, self.counted = [], []

    def step(self, time):
        judge, replicas = self.world.judge, self.mesh.replicas
        served = self.dealer.wiring.copy()
        step, far = Step(self.mesh.stages, replicas, 2, served), []
        for worker, does in self.bad.items():
            column = int(columns_of(served)[worker])
            moved = does(step, worker, column, int(self.generator.integers(2, 10**6)))
            far += [moved] if moved else []
        twins = Twins(0, np.ones(replicas, bool), step.gradients, step.norms, step.kinds, step.states)

        def alike(values):
            values[...] = values[:, :, :, :1]
            for direction, link, column, factor in far:
                here = (slice(None), direction, link, column)
                values[here] = np.where(judge.table.measures, values[here] * factor, values[here])

        if self.generator.random() < 0.25 or judge.record.suspicion:
            verdict = self.world.step(
                alike,
                digests=lambda marks: marks.__setitem__(slice(None), step.digests[None]),
                keyed=lambda keyed: keyed.__setitem__(slice(None), step.keyed),
                served=served,
                twins=twins,
            )
        else:
            verdict = self.world.step(served=served)
        self.skipped.append(verdict.skip)
        self.counted.append(sum(not verdict.excluded[columns_of(served)[worker]] for worker in self.bad))
        self.dealer.next(time, judge.doubts)
        return verdict


@pytest.mark.parametrize(
    ("does", "convicted"),
    [
        (sends, True),
        (another_kind, True),
        (another_kind_reported_as_near, False),
        (forges, False),
        (forges_gradients, False),
        (reports_other_contents, False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("replicas", [3, 5])
def test_who_hides_behind_a_convicted_worker_is_convicted_or_kept_where_columns_are_lost(replicas, does, convicted):
    bad = (replicas - 1) // 2
    sacrificed = {Worker(1, replica): sends for replica in range(bad)}
    hidden = {Worker(2, bad + replica): does for replica in range(bad)}
    run = Run(replicas, sacrificed | hidden)
    verdicts = [run.step(time) for time in range(STEPS)]
    known = set(map(tuple, np.argwhere(verdicts[-1].convicted)))
    assert known == set(sacrificed | (hidden if convicted else {}))
    packed = verdicts[-1].convicted | verdicts[-1].isolated
    assert all(packed[worker] for worker in hidden)
    assert not any(run.skipped[SETTLED:]) and not any(run.counted[SETTLED:])
    assert not any(verdict.halt for verdict in verdicts)


def says_something_else(step, worker, column, number):
    """As all who do it, so that two of them would be two against one."""
    step.sends(worker.stage, column, FORWARD, 7)


def lies_and_sends(step, worker, column, number):
    reports_other_contents(step, worker, column, number)
    sends(step, worker, column, number)


@pytest.mark.parametrize(
    ("replicas", "bad"),
    [
        (3, {Worker(1, 1): another_kind, Worker(2, 2): says_something_else, Worker(3, 2): reports_other_contents}),
        (4, {Worker(1, 0): forges, Worker(2, 1): lies_and_sends}),
    ],
    ids=["nobody_of_the_stage_is_ever_sound", "two_of_four_columns_each_wrong_otherwise"],
)
def test_bad_workers_of_several_stages_do_not_keep_all_columns_out_for_ever(replicas, bad):
    run = Run(replicas, bad, stages=5)
    verdicts = [run.step(time) for time in range(2 * STEPS)]
    packed = verdicts[-1].convicted | verdicts[-1].isolated
    assert all(packed[worker] for worker in bad)
    assert set(map(tuple, np.argwhere(verdicts[-1].convicted))) <= set(bad)
    assert not any(run.skipped[STEPS:]) and not any(run.counted[STEPS:])


def test_wiring_that_stands_still_convicts_nobody_for_it():
    run = Run(3, {Worker(1, 0): sends, Worker(2, 1): forges})
    assert (run.dealer.wiring == identity(run.mesh)).all()
    for time in range(20):
        verdict = run.step(time)
        run.dealer.load_state_dict({"wiring": identity(run.mesh)})
    assert set(map(tuple, np.argwhere(verdict.convicted))) == {(1, 0)}
