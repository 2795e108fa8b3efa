import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import NAMES, RECEIVED, Rows
from deepspeed_sentinel.judgement.account import Account
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker

NON_FINITE, ENERGY, MAX_ABS, COSINE, STEP = (
    NAMES.index(name) for name in ("non_finite", "energy", "max_abs", "transfer_cosine", "transfer_step")
)


def louder(direction, link, column, factor=30.0, micro_batches=slice(None)):
    def change(values):
        values[:, direction, link, column, micro_batches, ENERGY] *= factor

    return change


def test_clean_traffic_raises_no_alarm_and_convicts_nobody():
    world = World(seed=7)
    verdicts = world.warm_up(400)
    judged = sum(verdict.judged for verdict in verdicts)
    assert judged >= 20_000
    assert sum(verdict.alarms.sum() for verdict in verdicts) <= 0.001 * judged
    assert not verdicts[-1].convicted.any()


@pytest.mark.parametrize("factor", [30.0, 1 / 30.0])
@pytest.mark.parametrize(("direction", "link", "stage"), [(FORWARD, 1, 1), (BACKWARD, 1, 2), (BACKWARD, 0, 1)])
def test_the_sender_of_an_outlier_is_blamed_excluded_and_convicted(direction, link, stage, factor):
    world = World()
    world.warm_up()
    for strike in range(3):
        verdict = world.step(louder(direction, link, 2, factor))
        assert [finding.worker for finding in verdict.findings] == [Worker(stage, 2)]
        assert verdict.findings[0].statistic == "energy"
        assert verdict.excluded.tolist() == [False, False, True]
        assert bool(verdict.newly_convicted) == (strike == 2)
    assert verdict.newly_convicted == (Worker(stage, 2),)


def test_blame_and_conviction_follow_the_worker_that_served_the_column():
    world = World(replicas=4)
    world.warm_up()
    for step in range(3):
        served = np.array([[0, 1, 2, 3], np.roll([0, 1, 2, 3], step), [0, 1, 2, 3], [0, 1, 2, 3]])
        column = int(np.flatnonzero(served[1] == 2)[0])
        verdict = world.step(louder(FORWARD, 1, column), served=served)
        assert [finding.worker for finding in verdict.findings] == [Worker(1, 2)]
        assert np.flatnonzero(verdict.excluded).tolist() == [column]
        assert np.argmax(verdict.worker_scores[1]) == 2
    assert verdict.newly_convicted == (Worker(1, 2),)


def test_the_cascade_is_neither_counted_nor_learnt():
    def tampered(values):
        for direction, link in ((FORWARD, 1), (FORWARD, 2), (BACKWARD, 2), (BACKWARD, 1), (BACKWARD, 0)):
            louder(direction, link, 0)(values)

    world = World()
    world.warm_up()
    before = world.judge.fences.reach.copy()
    for _ in range(50):
        verdict = world.step(tampered)
        assert {finding.worker for finding in verdict.findings} == {Worker(1, 0)}
    assert verdict.convicted.sum() == 1
    grown = world.judge.fences.reach / before
    assert (grown[~np.isnan(before)] <= 1.5).all()


def test_honest_columns_do_not_stand_out_where_most_are_spoilt():
    """Four of five columns are spoilt, each by a worker of another stage; the fifth has to stay clean."""
    world = World(stages=6, replicas=5)
    world.warm_up()
    for _ in range(3):

        def tampered(values):
            for stage in range(1, 5):
                for link in range(stage, 5):
                    louder(FORWARD, link, stage - 1)(values)
                for link in range(5):
                    louder(BACKWARD, link, stage - 1)(values)

        verdict = world.step(tampered)
        assert {finding.worker for finding in verdict.findings} == {Worker(stage, stage - 1) for stage in range(1, 5)}
        assert verdict.excluded.tolist() == [True, True, True, True, False]


def test_a_turn_of_training_that_all_replicas_share_convicts_nobody():
    """From one step to the next honest replicas differ ten times as much."""

    def wilder(values):
        of_gradients = values[:, BACKWARD, 1, ..., STEP]
        of_gradients[:] = 0.4 * (of_gradients / 0.4) ** 10

    world = World(replicas=8)
    world.warm_up()
    verdicts = [world.step(wilder) for _ in range(20)]
    assert sum(verdict.suspected.sum() for verdict in verdicts) <= 0.02 * 20 * 8
    assert not verdicts[-1].convicted.any()
    assert world.step(louder(BACKWARD, 1, 3)).findings[0].worker == Worker(2, 3)


def test_a_stage_whose_workers_are_all_convicted_leaves_the_others_their_centre():
    def tampered(values):
        for column, first in ((0, 1), (1, 1), (2, 2)):
            for link in range(first, 4):
                louder(FORWARD, link, column)(values)
            for link in range(4):
                louder(BACKWARD, link, column)(values)

    world = World(stages=5, replicas=5)
    world.warm_up()
    world.judge.record.convicted[3] = True
    verdict = world.step(tampered)
    assert {finding.worker for finding in verdict.findings} == {Worker(1, 0), Worker(1, 1), Worker(2, 2)}


def test_two_bad_workers_of_three_columns_do_not_put_the_honest_third_in_the_wrong():
    def tampered(values):
        for link in (1, 2):
            louder(FORWARD, link, 0)(values)
        louder(FORWARD, 2, 1)(values)
        for link in range(3):
            louder(BACKWARD, link, slice(0, 2))(values)

    world = World(stages=4, replicas=3)
    world.warm_up()
    for _ in range(3):
        verdict = world.step(tampered)
        assert {finding.worker for finding in verdict.findings} == {Worker(1, 0), Worker(2, 1)}
        assert verdict.excluded.tolist() == [True, True, False]


def test_an_alarm_is_traced_back_to_the_message_that_stayed_just_inside_its_fence():
    world = World()
    world.warm_up()
    for _ in range(3):

        def tampered(values):
            typical = np.median(values[0, FORWARD, 1, :, :, ENERGY])
            values[:, FORWARD, 1, 2, :, ENERGY] = typical * np.exp(0.8 * world.judge.fences.reach[ENERGY, FORWARD, 1])
            louder(BACKWARD, 1, 2)(values)

        verdict = world.step(tampered)
        assert {finding.worker for finding in verdict.findings} == {Worker(1, 2)}
        assert "to which alarms behind them are traced back" in str(verdict.findings[0])
        assert "outside" not in str(verdict.findings[0])
        assert verdict.excluded.tolist() == [False, False, True]
    assert not world.judge.record.strikes.any()


def test_trusted_stages_are_excluded_but_never_convicted():
    world = World()
    world.warm_up()
    verdicts = [world.step(louder(FORWARD, 0, 1)) for _ in range(10)]
    for verdict in verdicts[:3]:
        assert verdict.findings[0].trusted and verdict.excluded[1]
    # What lasts of a stage that was given nothing but data is usual.
    assert not verdicts[-1].excluded.any() and not verdicts[-1].convicted.any()


def test_non_finite_counts_even_while_warming_up():
    def nan(values):
        values[:, FORWARD, 1, 1, 2, NON_FINITE] = 5

    verdict = World().step(nan)
    assert verdict.warming_up and verdict.excluded.tolist() == [False, True, False]
    assert verdict.findings[0].worker == Worker(1, 1) and verdict.findings[0].micro_batches == (2,)


def test_different_digests_are_a_dispute_that_convicts_nobody():
    def differ(marks):
        marks[0, FORWARD, 1, 2, :] = 99

    world = World()
    world.warm_up()
    for _ in range(10):
        verdict = world.step(digests=differ)
        assert verdict.excluded.tolist() == [False, False, True]
        assert not verdict.findings and not verdict.convicted.any()
        (dispute,) = verdict.disputed
        assert (dispute.sender, dispute.receiver) == (Worker(1, 2), Worker(2, 2))


def test_a_receiver_that_lies_about_a_statistic_makes_a_dispute_not_an_alarm():
    def frame(values):
        values[1, FORWARD, 0, 1, :, ENERGY] *= 100

    world = World()
    world.warm_up()
    for _ in range(5):
        verdict = world.step(frame)
        assert verdict.disputed and not verdict.findings and not verdict.convicted.any()
        assert verdict.excluded.tolist() == [False, True, False]


def test_neighbours_that_contradict_each_other_dispute_what_lies_between_them():
    def lie(values):
        values[1, FORWARD, 1, 2, :, COSINE] = 0.1

    world = World()
    world.warm_up()
    for _ in range(5):
        verdict = world.step(lie)
        assert not verdict.findings and not verdict.convicted.any()
        assert verdict.excluded.tolist() == [False, False, True]
        (dispute,) = verdict.disputed
        assert (dispute.sender, dispute.receiver, dispute.about) == (Worker(0, 2), Worker(2, 2), Worker(1, 2))
        assert "what entered and left worker (stage 1, replica 2)" in str(dispute)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(("direction", "link"), [(FORWARD, 0), (BACKWARD, -1)])
def test_a_number_for_a_pair_that_there_is_not_is_nothing(replicas, direction, link):
    """By the one that received from the first stage or the last."""

    def invented(values):
        values[RECEIVED, direction, link, 0, 0, NAMES.index("transfer_gain")] = 0.1

    world = World(replicas=replicas)
    world.warm_up()
    verdict = world.step(invented)
    assert not verdict.disputed and not verdict.findings and not verdict.excluded.any()


def test_where_the_sender_has_no_second_neighbour_a_dispute_is_between_the_ends_of_the_link():
    mesh = Mesh(4, 3)
    account = Account(mesh, np.tile(np.arange(3), (4, 1)), Rows(1))
    contested = np.zeros((2, mesh.links, 3, 1), bool)
    contested[FORWARD, 0, 1] = contested[BACKWARD, -1, 2] = True
    forward, backward = account.disputes(contested, np.zeros_like(contested))
    assert (forward.sender, forward.receiver, forward.about) == (Worker(0, 1), Worker(1, 1), None)
    assert (backward.sender, backward.receiver, backward.about) == (Worker(3, 2), Worker(2, 2), None)


def test_slightly_different_baselines_at_the_two_ends_are_no_dispute():
    def shift(values):
        values[1, :, :, :, :, 0] *= 1.02

    world = World()
    world.warm_up()
    assert not world.step(shift).disputed


def test_everybody_out_skips_and_too_many_skips_halt():
    def all_bad(values):
        values[:, FORWARD, 1, :, :, NON_FINITE] = 1

    world = World()
    world.warm_up()
    for _ in range(3 + 4):  # the third convicts, and what teaches something does not count
        verdict = world.step(all_bad)
        assert verdict.skip and verdict.excluded.all() and not verdict.halt
    assert "max_skipped_steps" in world.step(all_bad).halt


def test_observe_excludes_nobody():
    world = World(action="observe")
    world.warm_up()
    verdict = world.step(louder(FORWARD, 1, 0))
    assert verdict.findings and verdict.suspected[0] and not verdict.excluded.any()


def test_quarantine_lasts_until_probation_ends_and_one_strike_brings_it_back():
    world = World(action="quarantine")
    world.warm_up()
    for _ in range(3):
        world.step(louder(FORWARD, 1, 2))
    quiet = [world.step() for _ in range(30)]
    assert all(verdict.excluded.tolist() == [False, False, True] for verdict in quiet[:29])
    assert quiet[29].released == (Worker(1, 2),)
    assert not world.step().excluded.any()
    assert world.step(louder(FORWARD, 1, 2)).newly_convicted == (Worker(1, 2),)


def test_halt_names_the_worker():
    world = World(action="halt")
    world.warm_up()
    verdicts = [world.step(louder(FORWARD, 1, 2)) for _ in range(3)]
    assert [bool(verdict.halt) for verdict in verdicts] == [False, False, True]
    assert "worker (stage 1, replica 2)" in verdicts[-1].halt


@pytest.mark.parametrize("replicas", [1, 2])
def test_few_replicas_are_compared_with_the_recent_past(replicas):
    world = World(replicas=replicas)
    world.warm_up(60)
    verdict = world.step(louder(FORWARD, 1, replicas - 1))
    assert [finding.worker for finding in verdict.findings] == [Worker(1, replicas - 1)]
    assert verdict.excluded.tolist() == [[False], [False, True]][replicas - 1]


def test_an_overflow_of_most_columns_is_left_to_loss_scaling():
    def overflow(values):
        values[:, BACKWARD, :, :2, :, NON_FINITE] = 3

    world = World()
    world.warm_up()
    verdict = world.step(overflow, overflow_limit=10.0)
    assert not verdict.excluded.any() and not verdict.findings and verdict.skip and verdict.overflow
    assert world.step(overflow).excluded[:2].all()


def test_an_overflow_of_one_column_is_excluded_without_a_strike_when_it_is_plausible():
    def overflow(values):
        values[:, BACKWARD, 1, 0, :, NON_FINITE] = 3

    world = World()
    world.warm_up()
    for _ in range(5):
        verdict = world.step(overflow, overflow_limit=10.0)
        assert verdict.excluded[0] and verdict.findings[0].overflow and not verdict.convicted.any()
    for _ in range(3):
        verdict = world.step(overflow, overflow_limit=1e9)
    assert verdict.newly_convicted == (Worker(2, 0),)


def test_state_round_trip_gives_the_same_verdicts():
    one = World(seed=3)
    one.warm_up(40)
    one.step(louder(FORWARD, 1, 2))
    other = World(seed=3)
    other.judge.load_state_dict(one.judge.state_dict())
    other.generator.bit_generator.state = one.generator.bit_generator.state
    other.time = one.time
    for _ in range(5):
        first, second = one.step(louder(FORWARD, 1, 2)), other.step(louder(FORWARD, 1, 2))
        assert first.digest() == second.digest()
        assert first.newly_convicted == second.newly_convicted


def test_what_was_learnt_serves_another_action_and_the_digest_tells_them_apart():
    """As where the action is changed while a run goes on: the same alarms and strikes, and other columns are out."""
    excludes = World(seed=3)
    excludes.warm_up()
    excludes.step(louder(FORWARD, 1, 2))
    others = [World(seed=3, action=action) for action in ("exclude", "observe", "halt")]
    for other in others:
        other.judge.load_state_dict(excludes.judge.state_dict())
        other.generator.bit_generator.state = excludes.generator.bit_generator.state
        other.time = excludes.time
    for step in range(3):
        verdict = excludes.step(louder(FORWARD, 1, 2))
        same, observed, halted = (other.step(louder(FORWARD, 1, 2)) for other in others)
        assert verdict.excluded.tolist() == halted.excluded.tolist() == [False, False, True]
        assert not observed.excluded.any() and bool(halted.halt) == (step == 1) and not observed.halt
        for other in (same, observed, halted):
            assert (other.alarms == verdict.alarms).all() and (other.scores == verdict.scores).all()
            assert other.newly_convicted == verdict.newly_convicted == (((1, 2),) if step == 1 else ())
        assert same.digest() == verdict.digest() and len({verdict.digest(), observed.digest(), halted.digest()}) == 3
    quiet = [one.step().digest() for one in others]
    assert len(set(quiet)) == 3, "also where nothing follows from it"


def test_digest_differs_when_any_verdict_differs():
    one, other = World(seed=3), World(seed=3)
    assert [v.digest() for v in one.warm_up(25)] == [v.digest() for v in other.warm_up(25)]
    assert one.step(louder(FORWARD, 1, 2)).digest() != other.step(louder(FORWARD, 1, 1)).digest()


def test_growing_activations_are_no_alarm():
    world = World(seed=5)
    world.warm_up()

    def grown(values):
        values[..., [0, 3, ENERGY, MAX_ABS]] *= 50.0

    assert not world.step(grown).findings


def test_a_thousand_workers():
    world = World(stages=8, replicas=128)
    world.warm_up(24)
    verdict = world.step(louder(FORWARD, 3, 100))
    assert Worker(3, 100) in [finding.worker for finding in verdict.findings]
    assert np.count_nonzero(verdict.excluded) <= 4


def test_evidence_as_it_is_sent_gives_the_verdicts_of_its_exact_values():
    """float32 and the same numbers in float64, the fault and the dispute included."""
    worlds = World(seed=3), World(seed=3)

    def spoil(values, time):
        if time > 25:
            values[:, FORWARD, 1, 1, 0, ENERGY] *= 30.0
        if time == 40:
            values[1, BACKWARD, 0, 0, 1, ENERGY] *= 2.0

    for _ in range(45):
        verdicts = []
        for world, dtype in zip(worlds, (np.float32, np.float64), strict=True):
            values = world.statistics().astype(np.float32)
            spoil(values, world.time)
            values = values.astype(dtype)
            marks = np.zeros((*values.shape[:5], 1), np.int64)
            verdicts.append(world.judge.step(Evidence(world.mesh, world.time, values, marks)))
            world.time += 1
        assert verdicts[0].digest() == verdicts[1].digest()
        np.testing.assert_array_equal(verdicts[0].scores, verdicts[1].scores)
    assert verdicts[0].convicted.any()
