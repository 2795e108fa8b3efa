"""Twin steps in the judge: suspects are tried, proof convicts, and who is cleared goes on."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic import World

from deepspeed_sentinel.evidence.step import Evidence, Twins
from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.mesh import FORWARD, Worker

ENERGY = NAMES.index("energy")


def twins(world, gradients=None, kinds=None):
    replicas = world.mesh.replicas
    alike = np.ones((world.mesh.stages, replicas), np.int64)
    kinds, norms = np.zeros_like(alike) if kinds is None else kinds, np.ones(alike.shape)
    return Twins(0, np.ones(replicas, bool), alike if gradients is None else gradients, norms, kinds)


def loud(stage, column):
    def change(values):
        values[:, FORWARD, stage, column, :, ENERGY] *= 50.0

    return change


def changed(world, change):
    values = world.statistics()
    change(values)
    return values


def alike(values):
    """As where all are given the same."""
    values[:] = values[:, :, :, :1]


def apart(stage, column):
    def change(values):
        alike(values)
        values[:, FORWARD, stage, column, :, ENERGY] *= 1.1

    return change


def odd(stage, column):
    """Other bits than the rest, in all that follows too."""

    def mark(digests):
        digests[:, FORWARD, stage:, column] = 9
        digests[:, 1, :, column] = 9

    return mark


def by_proof(replicas=3, **more):
    world = World(replicas=replicas, conviction="proof", **more)
    world.warm_up()
    return world


def test_strikes_make_a_suspect_and_convict_nobody():
    world = by_proof()
    for _ in range(6):
        verdict = world.step(loud(1, 2))
        assert verdict.excluded.tolist() == [False, False, True] and verdict.suspects[1, 2]
    assert not verdict.convicted.any()


def test_proof_convicts_at_once_without_a_strike_before():
    world = by_proof()
    verdict = world.step(digests=odd(1, 2), twins=twins(world))
    assert verdict.newly_convicted == (Worker(1, 2),) and verdict.excluded.tolist() == [False, False, True]
    assert not verdict.suspects.any()


def test_a_trial_that_convicts_calls_for_another_until_one_finds_nobody_new():
    world = by_proof(5, wiring="static")
    assert not world.judge.record.suspicion
    world.step(digests=odd(1, 2), twins=twins(world))
    assert world.judge.record.suspicion
    world.step()
    assert world.judge.record.suspicion
    world.step(digests=odd(1, 2), twins=twins(world))
    assert not world.judge.record.suspicion


def test_where_columns_are_dealt_anew_it_calls_for_trials_of_those_behind():
    world = by_proof(5)
    world.step(digests=odd(1, 2), twins=twins(world))
    behind = [[2, 2]]
    assert np.argwhere(world.judge.doubts.untried).tolist() == behind and not world.judge.doubts.suspects.any()
    world.step(digests=odd(1, 2), twins=twins(world))
    assert np.argwhere(world.judge.doubts.untried).tolist() == behind and world.judge.record.suspicion
    moved = np.tile(np.arange(5), (4, 1))
    moved[2, [2, 3]] = [3, 2]
    world.step(digests=odd(1, 2), twins=twins(world), served=moved)
    assert not world.judge.doubts.untried.any() and not world.judge.record.suspicion


def test_trials_that_settle_nothing_become_rarer():
    world = by_proof()
    world.step(loud(2, 1))
    chances = []
    for _ in range(12):
        chances.append(world.judge.record.suspicion)
        world.step(digests=odd(1, 1), twins=twins(world))  # behind bad work the suspect is not tested
        world.step(loud(2, 1))
    assert chances[0] == 0.5 and chances[-1] < 0.2


def test_proof_convicts_in_the_warm_up_too():
    world = World(conviction="proof")
    assert world.step(digests=odd(1, 2), twins=twins(world)).newly_convicted == (Worker(1, 2),)


def test_a_suspect_that_does_what_the_others_do_is_cleared():
    world = by_proof()
    world.step(loud(1, 2))
    verdict = world.step(twins=twins(world))
    assert verdict.cleared == (Worker(1, 2),) and not verdict.suspects.any() and not verdict.excluded.any()


def test_what_lasts_of_a_worker_that_is_cleared_is_its_own_normal():
    world = by_proof()
    for _ in range(4):
        assert world.step(loud(1, 2)).excluded[2]
    world.step(twins=twins(world))
    after = [world.step(loud(1, 2)) for _ in range(12)]
    assert not any(verdict.excluded.any() for verdict in after)
    assert world.step(loud(2, 1)).excluded[1]


def test_what_was_seen_once_is_not():
    world = by_proof()
    world.step(loud(1, 2))
    world.step(twins=twins(world))
    assert world.step(loud(1, 2)).excluded[2]


def test_wrong_gradients_of_weights_leave_the_column_out():
    world = by_proof()
    gradients = np.ones((4, 3), np.int64)
    gradients[2, 0] = 5
    verdict = world.step(twins=twins(world, gradients))
    assert verdict.newly_convicted == (Worker(2, 0),) and verdict.excluded.tolist() == [True, False, False]


def test_statistics_do_not_accuse_whom_exact_comparison_finds_right():
    world = by_proof()
    verdict = world.step(loud(1, 2), twins=twins(world))
    assert not verdict.findings and not verdict.excluded.any()


def test_a_worker_on_other_hardware_is_left_out_of_twin_steps_and_never_suspected_for_it():
    def same(values):
        values[:] = values[:, :, :, :1]
        values[:, FORWARD, 1:, 2] *= 1 + 1e-4

    world = by_proof()
    kinds = np.zeros((4, 3), np.int64)
    kinds[1, 2] = 1
    for _ in range(4):
        verdict = world.step(same, odd(1, 2), twins=twins(world, kinds=kinds))
        assert verdict.excluded.tolist() == [False, False, True] and verdict.alike.all()
        assert not (verdict.proofs or verdict.differences or verdict.findings or verdict.suspects.any())
    assert not world.step().excluded.any()


def test_nothing_is_learnt_from_a_twin_step_but_where_training_is():
    world = by_proof()
    before = world.judge.fences.state_dict()
    world.step(twins=twins(world))
    assert not world.judge.clean_links.any()
    after = world.judge.fences.state_dict()
    changed = {name for name, array in after.items() if not np.array_equal(array, before[name], equal_nan=True)}
    assert changed == {"centres"}


def test_nan_in_all_twins_alike_accuses_nobody_and_stays_out():
    def broken(values):
        values[:, FORWARD, 1:, :, :, NAMES.index("non_finite")] = 3

    world = by_proof()
    verdict = world.step(broken, twins=twins(world))
    assert verdict.skip and not verdict.newly_convicted and not verdict.proofs and not verdict.suspects.any()


def test_first_and_last_stage_are_reported_and_never_convicted():
    world = by_proof()
    verdict = world.step(digests=odd(0, 1), twins=twins(world))
    assert verdict.proofs[0].worker == Worker(0, 1) and verdict.excluded.tolist() == [False, True, False]
    assert not verdict.newly_convicted and not verdict.convicted.any()


def test_with_two_replicas_the_one_that_was_in_alarm_is_convicted():
    world = World(replicas=2, conviction="statistics")
    world.warm_up()
    verdict = world.step(digests=odd(1, 1), twins=twins(world))
    assert verdict.differences and verdict.skip and not verdict.newly_convicted
    world.step(loud(1, 1))
    verdict = world.step(alike, digests=odd(1, 1), twins=twins(world))
    assert not verdict.newly_convicted and verdict.excluded.tolist() == [False, True], "it may be rounding"
    verdict = world.step(apart(1, 1), digests=odd(1, 1), twins=twins(world))
    assert verdict.newly_convicted == (Worker(1, 1),)


def test_where_replicas_differ_by_nature_strikes_convict():
    def unlike(digests):
        digests[:, FORWARD, 1:] = np.arange(3)[:, None, None]
        digests[:, 1] = np.arange(3)[:, None, None]

    def liar(digests):
        unlike(digests)
        digests[1, FORWARD, 0, 2] = 5

    world = by_proof()
    assert not world.step(digests=unlike, twins=twins(world)).excluded.any()
    assert world.step(digests=liar, twins=twins(world)).excluded.tolist() == [False, False, True], "its own column"
    convicted = [world.step(loud(1, 2)).newly_convicted for _ in range(3)]
    assert convicted[2] == (Worker(1, 2),)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_where_the_states_of_a_stage_are_all_unlike_strikes_convict_in_every_stage(stage):
    """Nobody's gradients are compared then, nor what anybody sends backward."""
    world = by_proof()
    told = np.ones((world.mesh.stages, 3), np.int64)
    told[stage] = 5, 6, 7
    for _ in range(3):
        quiet = world.step(twins=replace(twins(world), states=told))
        assert not quiet.findings and not quiet.newly_convicted and not quiet.excluded.any()
        verdict = world.step(loud(1, 2))
    assert verdict.newly_convicted == (Worker(1, 2),)


def test_who_tampers_and_says_that_its_state_is_another_one_is_proved():
    world = by_proof()
    told = np.ones((world.mesh.stages, 3), np.int64)
    told[1, 2] = 6
    verdict = world.step(digests=odd(1, 2), twins=replace(twins(world), states=told))
    assert verdict.newly_convicted == (Worker(1, 2),)
    assert not world.judge.record.strikes_count.any(), "it makes nobody's strikes count"


def test_where_no_twin_step_can_be_made_strikes_convict():
    world = by_proof()
    convicted = [world.step(loud(1, 2), refused=True).newly_convicted for _ in range(4)]
    assert convicted == [(), (), (Worker(1, 2),), ()]


def test_unequal_weights_are_proof():
    world = by_proof()
    values = world.statistics()
    evidence = Evidence(world.mesh, world.time, values, np.zeros((*values.shape[:5], 1), np.int64))
    assert world.judge.step(evidence, proved=[Worker(2, 1)]).newly_convicted == (Worker(2, 1),)


def test_a_proof_outside_a_twin_step_is_no_trial():
    """Who is proved by its weights in each step must not keep strikes from convicting where no trial can be made."""
    world, convicted = by_proof(), []
    for _ in range(3):
        evidence = Evidence(
            world.mesh, world.time, changed(world, loud(1, 2)), np.zeros((2, 2, 3, 3, 4, 1), np.int64), refused=True
        )
        convicted += world.judge.step(evidence, proved=[Worker(2, 0)]).newly_convicted
        world.time += 1
    assert convicted == [Worker(2, 0), Worker(1, 2)]


def test_a_proof_outside_a_twin_step_leaves_open_what_a_trial_has_left_open():
    world = by_proof()
    world.step(digests=odd(1, 2), twins=twins(world))
    chance = world.judge.record.suspicion
    evidence = Evidence(world.mesh, world.time, world.statistics(), np.zeros((2, 2, 3, 3, 4, 1), np.int64))
    world.judge.step(evidence, proved=[Worker(1, 2)])
    assert chance and world.judge.record.suspicion == chance


def test_strikes_that_no_audit_saw_convict_nobody_later():
    world, counts = by_proof(), []
    for _ in range(5):  # trials could be made, so a strike convicts nobody and is not looked into
        assert not world.judge.record.strikes_count.any()
        world.step(loud(1, 2))
    for refused in (True, True, True):
        verdict = world.step(refused=refused)
        counts.append(world.judge.record.strikes_count.all())
    assert counts == [True] * 3 and not verdict.convicted.any() and verdict.suspects[1, 2]
    world.step(twins=twins(world))
    assert not world.judge.record.strikes_count.any()


@pytest.mark.parametrize("replicas", [3, 5])
def test_state_of_suspects_goes_through_a_checkpoint(replicas):
    one = by_proof(replicas)
    for _ in range(3):
        one.step(loud(1, 2))
    other = World(replicas=replicas, conviction="proof")
    other.judge.load_state_dict(one.judge.state_dict())
    other.generator, other.time = one.generator, one.time
    verdict = other.step(twins=twins(other))
    assert verdict.cleared == (Worker(1, 2),)


def test_what_lasts_is_usual_of_the_column_in_which_it_was_seen_wherever_the_worker_is_cleared():
    """The data of column 2 are odd; replica 2 is struck for them there and cleared in column 1."""
    world = by_proof()
    for _ in range(4):
        assert world.step(loud(1, 2)).excluded[2]
    moved = np.tile(np.arange(3), (4, 1))
    moved[1] = [0, 2, 1]
    assert world.step(twins=twins(world), served=moved).cleared == (Worker(1, 2),)
    after = [world.step(loud(1, 2), served=moved) for _ in range(12)]
    assert not any(verdict.excluded.any() for verdict in after)


def made_up(stage, column):
    """A message with the digest of the right one, and the work of honest workers behind it."""

    def mark(digests):
        odd(stage, column)(digests)
        digests[:, FORWARD, stage, column] = 0

    def received(keyed):
        keyed[FORWARD, stage:, column] = keyed[1, :, column] = 9

    return {"digests": mark, "keyed": received}


def test_who_makes_up_messages_that_look_right_is_convicted_and_not_the_worker_behind_it():
    world = by_proof(stages=5)
    verdict = world.step(**made_up(1, 2), twins=twins(world))
    assert not verdict.proofs and not verdict.newly_convicted and verdict.excluded.tolist() == [False, False, True]
    (dispute,) = verdict.disputed
    assert (dispute.sender, dispute.receiver) == (Worker(1, 2), Worker(2, 2))
    assert world.judge.doubts.apart == ((Worker(1, 2), Worker(2, 2)),), "the two are dealt other partners"
    wiring = np.tile(np.arange(3), (5, 1))
    wiring[1] = [0, 2, 1]
    verdict = world.step(**made_up(1, 1), twins=twins(world), served=wiring)
    assert verdict.newly_convicted == (Worker(1, 2),) and not verdict.proofs
    assert np.argwhere(world.judge.record.convicted).tolist() == [[1, 2]]


def test_a_receiver_that_lies_about_what_it_got_takes_out_itself():
    def lie(column):
        def received(keyed):
            keyed[FORWARD, 1, column] = 5

        return received

    world = by_proof(stages=5)
    verdict = world.step(keyed=lie(2), twins=twins(world))
    assert not verdict.proofs and verdict.excluded.tolist() == [False, False, True]
    wiring = np.tile(np.arange(3), (5, 1))
    wiring[1] = [0, 2, 1]
    assert world.step(keyed=lie(2), twins=twins(world), served=wiring).newly_convicted == (Worker(2, 2),)


def test_outside_twin_steps_keyed_digests_differ_and_mean_nothing():
    def received(keyed):
        keyed[:] = np.arange(keyed.size).reshape(keyed.shape)

    world = by_proof()
    verdict = world.step(keyed=received)
    assert not verdict.excluded.any() and not verdict.disputed
