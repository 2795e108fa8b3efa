"""Steps in a row in which every column is out and nobody is found: honest training goes on, and liars are found out."""

import numpy as np
import pytest
from synthetic import World, settings

from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.judgement.deadlock import PATIENCE, Deadlock
from deepspeed_sentinel.mesh import FORWARD, Mesh, columns_of
from deepspeed_sentinel.response.dealing import Dealer

ENERGY, L2, MEAN_ABS, GAIN, STEP, COSINE = (
    NAMES.index(name) for name in ("energy", "l2_rel", "mean_abs", "transfer_gain", "transfer_step", "transfer_cosine")
)
MESSAGES, PAIRS = (ENERGY, L2, MEAN_ABS), (GAIN, STEP, COSINE)
AMOUNTS = 2.0, 4.5, 7.0  # fences


class Training:
    """Judge and dealer of a run, with twin steps as they are drawn; honest work is then what one column makes."""

    def __init__(self, stages, replicas, warm_up=100, **how):
        how = {"action": "quarantine", "conviction": "proof", "max_skipped_steps": 10, "probation_steps": 200, **how}
        self.world = World(stages, replicas, micro_batches=2, **how)
        self.world.warm_up(warm_up)
        self.judge, self.dealer = self.world.judge, Dealer(self.world.mesh)
        self.generator, self.reach = np.random.default_rng(0), self.judge.fences.reach.copy()
        self.twins = 0

    def step(self, change, lie=lambda values, columns: None):
        served, twins = self.dealer.wiring.copy(), None
        if self.generator.random() < self.judge.record.suspicion:
            alike, source = np.ones(served.shape, np.int64), int(self.generator.integers(served.shape[1]))
            twins = Twins(source, np.ones(served.shape[1], bool), alike, np.ones(served.shape), np.zeros_like(alike))
            self.twins += 1

        def all_of_it(values):
            change(values)
            if twins is not None:
                values[:] = values[:, :, :, [twins.source]]
            lie(values, columns_of(served))

        verdict = self.world.step(all_of_it, served=served, twins=twins)
        self.dealer.next(self.world.time, self.judge.doubts)
        assert not verdict.halt and not verdict.convicted.any()
        return verdict

    def turns(self, names, amounts, first_link=0):
        """Each column by another amount, and in each statistic another column furthest."""

        def change(values):
            for number, name in enumerate(names):
                for column in range(values.shape[3]):
                    reach = amounts[(column + number) % len(amounts)] * np.nan_to_num(self.reach[name])
                    reach[:, :first_link] = 0.0
                    of_column = values[:, :, :, column, :, name]
                    of_column[:] = shifted(name, of_column, reach[..., None])

        return change


def shifted(name, values, by):
    return values + by if name in (GAIN, COSINE) else values * np.exp(by)


def nothing(values):
    pass


@pytest.mark.parametrize(("names", "first_link"), [(MESSAGES, 0), (MESSAGES, 1), (PAIRS, 0)])
@pytest.mark.parametrize("how", [{}, {"action": "exclude"}, {"conviction": "statistics"}])
def test_columns_that_turn_by_different_amounts_at_once_do_not_stop_a_run(names, first_link, how):
    run = Training(5, 3, **how)
    change = run.turns(names, AMOUNTS, first_link)
    verdicts = [run.step(change) for _ in range(60)]
    lost = [verdict.skip for verdict in verdicts]
    assert sum(lost[:30]) <= 24 and sum(lost[-10:]) <= 5


@pytest.mark.parametrize("replicas", [4, 5, 8])
def test_with_more_replicas(replicas):
    run = Training(5, replicas)
    verdicts = [run.step(run.turns(MESSAGES, (2.0, 4.5, 7.0, 9.0, 12.0), 1)) for _ in range(30)]
    assert sum(verdict.skip for verdict in verdicts) <= 3


def test_without_a_change_there_is_no_twin_step_for_it():
    run = Training(5, 3)
    for _ in range(20):
        assert not run.step(nothing).skip
    assert run.twins == 0 and not run.judge.record.at_a_loss


LIARS = [
    (3, [(1, 0), (2, 1)]),
    (4, [(1, 0), (2, 1), (3, 2)]),
    (5, [(1, 0), (2, 1), (2, 2)]),
    (8, [(1, 0), (1, 1), (2, 2), (2, 3), (2, 4)]),
]


@pytest.mark.parametrize("in_twin_steps", [False, True])
@pytest.mark.parametrize(("replicas", "liars"), LIARS)
def test_a_turn_that_liars_make_up_stops_nothing(replicas, liars, in_twin_steps):
    """Each lies about the pair of stage 2, most columns alike, and in one of two statistics far off."""
    run = Training(6, replicas)

    def lie(values, columns):
        if in_twin_steps or (values != values[:, :, :, :1]).any():
            for number, liar in enumerate(liars):
                for other, name in enumerate((GAIN, STEP)):
                    reach = run.reach[name, FORWARD, 2] * (12.0 if number % 2 == other else 3.0)
                    of_column = values[:, FORWARD, 2, columns[liar], :, name]
                    of_column[:] = shifted(name, of_column, reach)

    verdicts = [run.step(nothing, lie) for _ in range(40)]
    most = max(np.bincount([stage for stage, _ in liars]))
    assert sum(verdict.skip for verdict in verdicts) <= 12
    assert all(np.count_nonzero(verdict.excluded) <= most + 1 for verdict in verdicts[-8:] if not verdict.twins)


def test_a_judge_that_goes_on_from_a_state_decides_alike():
    run, change = Training(5, 3), None
    for _ in range(12):
        change = change or run.turns(MESSAGES, AMOUNTS, 1)
        state = run.judge.state_dict()
        fresh = World(5, 3, micro_batches=2, **vars(run.judge.settings)).judge
        assert fresh.problem(state) is None
        fresh.load_state_dict(state)
        assert fresh.record.suspicion == run.judge.record.suspicion
        run.world.judge = run.judge = fresh
        run.step(change)
    assert run.twins > 2


@pytest.mark.parametrize("replicas", [3, 5])
def test_a_step_that_counts_now_and_then_is_no_way_out(replicas):
    """Liars that act in two steps of three, so that never three are lost in a row."""
    run, liars = Training(6, replicas), dict(LIARS)[replicas]

    def lie(values, columns):
        if run.world.time % 3:
            for number, liar in enumerate(liars):
                for other, name in enumerate((GAIN, STEP)):
                    reach = run.reach[name, FORWARD, 2] * (12.0 if number % 2 == other else 3.0)
                    of_column = values[:, FORWARD, 2, columns[liar], :, name]
                    of_column[:] = shifted(name, of_column, reach)

    assert sum(run.step(nothing, lie).skip for _ in range(90)) <= 40


def test_where_strikes_convict_a_turn_stays_an_excuse():
    """By strikes, or in a stage whose honest replicas do not make the same: honest workers would be convicted."""
    deadlock, nobody = Deadlock(Mesh(5, 3), settings(max_skipped_steps=10)), np.zeros((5, 3), bool)
    for strikes_convict, excuses in ((True, True), (False, False), (True, True)):
        for _ in range(PATIENCE):
            deadlock.end(True, nobody, news=False, strikes_convict=strikes_convict)
        assert deadlock.here and deadlock.excuses == excuses
