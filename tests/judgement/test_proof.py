"""What a twin step proves, and of whom."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.judgement.proof import try_twins
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker


class Step:
    """A twin step in which everybody is honest until a test changes the arrays."""

    def __init__(self, stages=4, replicas=3, micro_batches=2, served=None):
        self.mesh = Mesh(stages, replicas)
        shape = (2, stages - 1, replicas, micro_batches, 1)
        # what a stage makes of the same is the same: one number for each link and micro-batch
        numbers = 1 + np.arange(2 * (stages - 1) * micro_batches).reshape(2, stages - 1, 1, micro_batches, 1)
        self.digests = np.broadcast_to(numbers, shape).copy()
        self.keyed = 10 * self.digests[..., 0]
        self.disputed = np.zeros(shape[:4], bool)
        self.gradients = np.broadcast_to(100 + np.arange(stages)[:, None], (stages, replicas)).copy()
        self.served = np.tile(np.arange(replicas), (stages, 1)) if served is None else served
        self.convicted, self.suspects = (np.zeros((stages, replicas), bool) for _ in range(2))
        self.isolated = np.zeros((stages, replicas), bool)
        self.unlike = np.zeros(stages, bool)
        self.given = np.ones(replicas, bool)
        self.kinds, self.norms = np.zeros((stages, replicas), np.int64), np.ones((stages, replicas))
        self.measures = np.ones((2, *shape[:4], 2))
        self.states = np.ones((stages, replicas), np.int64)

    def sends(self, stage, column, direction, lie, micro_batches=slice(None)):
        """A wrong message, and what honest work makes of it in all that follows."""
        links = self.mesh.links
        start = stage if direction == FORWARD else 2 * links - stage
        for position in range(start, 2 * links):
            way, link = (FORWARD, position) if position < links else (BACKWARD, 2 * links - 1 - position)
            self.digests[way, link, column, micro_batches] += lie * 1000
            self.keyed[way, link, column, micro_batches] += lie * 1000
        for below in range(self.mesh.stages):
            if direction == FORWARD or below < stage:
                self.gradients[below, self.served[below, column]] += lie * 1000

    def forges(self, stage, column, direction, lie, micro_batches=slice(None)):
        """A wrong message with the public digest of the right one, and what honest work makes of it."""
        link = stage if direction == FORWARD else stage - 1
        self.sends(stage, column, direction, lie, micro_batches)
        self.digests[direction, link, column, micro_batches] -= lie * 1000

    def misreports(self, direction, link, column, lie):
        """Its receiver reports another keyed digest of an honest message."""
        self.keyed[direction, link, column] += lie * 100_000

    def trial(self):
        twins = Twins(0, self.given, self.gradients, self.norms, self.kinds, self.states)
        return try_twins(
            self.mesh,
            self.digests,
            self.measures,
            self.disputed,
            twins,
            self.served,
            self.convicted,
            self.suspects,
            self.unlike,
            self.keyed,
            self.isolated,
        )


def proved(trial):
    return {(proof.worker, proof.direction) for proof in trial.proofs}


def test_honest_workers_are_all_sound():
    trial = Step().trial()
    assert not trial.proofs and not trial.differences and not trial.spoilt.any()
    assert trial.sound.all() and trial.right.all() and not trial.unlike.any()


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("micro_batches", [slice(None), [1]])
def test_who_sends_another_message_is_proved_and_nobody_behind_it(direction, micro_batches):
    step = Step()
    step.sends(2, 1, direction, lie=7, micro_batches=micro_batches)
    trial = step.trial()
    assert proved(trial) == {(Worker(2, 1), direction)}
    assert trial.spoilt.tolist() == [False, True, False]
    assert trial.proofs[0].agreeing == 2 and trial.proofs[0].compared == 3
    assert not trial.sound[2, 1] and trial.sound[:, [0, 2]].all()
    assert not trial.sound[1, 1]  # what it was given was spoilt, so it is not cleared


def test_the_worked_example_of_the_docstring():
    letters = {
        (FORWARD, 0): "aaa",
        (FORWARD, 1): "bbc",
        (FORWARD, 2): "dde",
        (BACKWARD, 2): "ffg",
        (BACKWARD, 1): "hij",
        (BACKWARD, 0): "klm",
    }
    step = Step(micro_batches=1)
    for (direction, link), word in letters.items():
        step.digests[direction, link, :, 0, 0] = [ord(letter) for letter in word]
    step.gradients[2] = [ord(letter) for letter in "ppq"]
    trial = step.trial()
    assert proved(trial) == {(Worker(1, 2), FORWARD)}
    assert [(one.workers, one.direction) for one in trial.differences] == [((Worker(2, 0), Worker(2, 1)), BACKWARD)]
    assert trial.spoilt.all() and not trial.sound[2].any()


def test_gradients_of_weights_that_never_cross_a_link_are_compared():
    step = Step()
    step.gradients[1, 2] += 5
    trial = step.trial()
    assert proved(trial) == {(Worker(1, 2), None)}
    assert trial.spoilt.tolist() == [False, False, True]
    assert trial.sound[2].all() and not trial.sound[1, 2]


def test_who_says_that_it_accumulated_nothing_is_compared_as_any_other():
    step = Step()
    step.gradients[1, 2] = 0
    trial = step.trial()
    assert proved(trial) == {(Worker(1, 2), None)} and trial.spoilt.tolist() == [False, False, True]
    step.gradients[1] = 0  # a stage without weights to train
    trial = step.trial()
    assert not trial.proofs and not trial.spoilt.any() and trial.sound.all() and trial.same.all()


def test_first_and_last_stage_are_compared_too_and_marked_as_trusted():
    step = Step(replicas=4)
    step.sends(0, 0, FORWARD, lie=3)
    step.gradients[3, 1] += 1
    trial = step.trial()
    assert proved(trial) == {(Worker(0, 0), FORWARD), (Worker(3, 1), None)}
    assert all(proof.trusted for proof in trial.proofs)


def test_a_dispute_proves_nothing_and_ends_what_can_be_said_of_its_column():
    step = Step()
    step.sends(1, 0, FORWARD, lie=3)
    step.disputed[FORWARD, 1, 0] = True
    trial = step.trial()
    assert not trial.proofs and not trial.differences


def test_two_replicas_that_differ_name_nobody():
    step = Step(replicas=2)
    step.sends(1, 0, FORWARD, lie=3)
    trial = step.trial()
    assert not trial.proofs and trial.spoilt.all()
    assert trial.differences[0].workers == (Worker(1, 0), Worker(1, 1))


def test_of_two_replicas_that_differ_the_suspect_is_wrong():
    step = Step(replicas=2)
    step.sends(1, 0, FORWARD, lie=3)
    step.suspects[1, 0] = True
    trial = step.trial()
    assert not trial.proofs and trial.spoilt.tolist() == [True, False], "it may be rounding"
    step.measures[:, FORWARD, 1:, 0] *= 1.1
    trial = step.trial()
    assert proved(trial) == {(Worker(1, 0), FORWARD)} and trial.spoilt.tolist() == [True, False]
    step.suspects[1, 1] = True
    trial = step.trial()
    assert not trial.proofs and trial.spoilt.all()


def test_where_nobody_can_tell_the_suspect_is_left_out_alone_and_not_convicted():
    step = Step(replicas=3)
    step.sends(1, 2, FORWARD, lie=5)
    step.sends(2, 1, FORWARD, lie=3)
    trial = step.trial()
    assert proved(trial) == {(Worker(1, 2), FORWARD)} and trial.spoilt.all()
    step.suspects[2, 1] = True
    trial = step.trial()
    assert proved(trial) == {(Worker(1, 2), FORWARD)} and trial.spoilt.tolist() == [False, True, True]
    assert trial.differences and not trial.sound[2].any()


def test_half_of_the_replicas_odd_alike_name_nobody():
    step = Step(replicas=4)
    for column in (0, 1):
        step.sends(1, column, FORWARD, lie=3)
    trial = step.trial()
    assert not trial.proofs and trial.differences and trial.spoilt.all()


def test_fewer_than_half_of_a_stage_cannot_convict_an_honest_one_where_other_columns_are_lost():
    # Of eight replicas three may be bad. Stage 1 takes four columns away; of the other four three lie alike at stage 2.
    step = Step(replicas=8)
    for column in (0, 1, 2):
        step.sends(1, column, FORWARD, lie=column + 1)
    step.disputed[FORWARD, 1, 3] = True
    for column in (4, 5, 6):
        step.sends(2, column, FORWARD, lie=9)
    trial = step.trial()
    assert {worker for worker, _ in proved(trial)} == {Worker(1, 0), Worker(1, 1), Worker(1, 2)}
    assert trial.differences[0].workers == tuple(Worker(2, column) for column in (4, 5, 6, 7))


def test_who_is_convicted_has_no_voice_and_may_be_honest_by_now():
    step = Step(replicas=8)
    step.convicted[2, [4, 5]] = True
    for column in (0, 1, 2, 3):
        step.disputed[FORWARD, 0, column] = True
    for column in (4, 5):
        step.sends(2, column, FORWARD, lie=9)
    trial = step.trial()  # two convicted lie alike, two agree; three others could be bad
    assert not trial.proofs and trial.differences[0].columns == (4, 5)
    step.disputed[FORWARD, 0, [0, 1]] = False
    assert {worker for worker, _ in proved(step.trial())} == {Worker(2, 4), Worker(2, 5)}


@pytest.mark.parametrize(("replicas", "convicted", "bad"), [(5, [0, 1], [2, 3]), (5, [0], [2, 3])])
def test_convictions_make_no_majority_of_those_that_are_bad_now(replicas, convicted, bad):
    step = Step(replicas=replicas)
    step.convicted[1, convicted] = True
    for column in bad:
        step.sends(1, column, FORWARD, lie=9)
    step.disputed[FORWARD, 1, 1] = True
    assert Worker(1, 4) not in {worker for worker, _ in proved(step.trial())}


def test_of_three_with_one_convicted_the_other_two_still_make_the_truth():
    step = Step(replicas=3)
    step.convicted[1, 0] = True
    step.sends(1, 0, FORWARD, lie=9)
    assert proved(step.trial()) == {(Worker(1, 0), FORWARD)}


def test_work_that_is_not_the_same_by_nature_proves_nothing():
    step = Step(replicas=3)
    step.digests[FORWARD, 1:, :, :, 0] += np.arange(3)[:, None] * 100
    step.digests[BACKWARD, ..., 0] += np.arange(3)[:, None] * 100
    trial = step.trial()
    assert not trial.proofs and not trial.differences and not trial.spoilt.any()
    assert trial.unlike.tolist() == [False, True, False, False]


def test_where_work_is_known_to_differ_by_nature_a_dispute_leaves_nobody_else_out():
    step = Step(replicas=3)
    step.digests[FORWARD, 1:, :, :, 0] += np.arange(3)[:, None] * 100
    step.digests[BACKWARD, ..., 0] += np.arange(3)[:, None] * 100
    step.disputed[FORWARD, 0, 2] = True  # one of three is out before, and two that differ are no more than can be bad
    assert step.trial().spoilt.tolist() == [True, True, False]
    step.unlike[1] = True
    trial = step.trial()
    assert not trial.proofs and not trial.differences and not trial.spoilt.any() and trial.unlike[1]


def test_where_work_is_known_to_differ_by_nature_who_differs_from_a_truth_is_held_to_it_by_statistics():
    step = Step(replicas=3)
    step.unlike[1] = True
    step.sends(1, 2, FORWARD, lie=5)
    trial = step.trial()
    assert not trial.proofs and trial.spoilt.tolist() == [False, False, True], "an odd one may be so by chance"
    assert trial.sound[1, :2].all() and not trial.alike[1] and trial.alike[[0]].all()
    step.measures[:, FORWARD, 1, 2] *= 1.1
    trial = step.trial()
    assert proved(trial) == {(Worker(1, 2), FORWARD)} and trial.sound[1].tolist() == [True, True, False]


GROUPS = [[0, 0, 1, 1], [0, 0, 1, 2, 3], [0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1], [0] * 4 + [1] * 4]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_where_more_differ_from_most_than_can_be_bad_work_differs_by_nature(groups):
    """Such as two kernels that tuning has chosen between."""
    step = Step(replicas=len(groups))
    for column, group in enumerate(groups):
        if group:
            step.sends(1, column, FORWARD, lie=group)
    trial = step.trial()
    assert not trial.proofs and trial.unlike.tolist() == [False, True, False, False]
    assert trial.differences and trial.spoilt.all(), "half of them may be bad: out once"
    step.unlike[1] = True
    trial = step.trial()
    assert not trial.proofs and not trial.differences and not trial.spoilt.any() and trial.unlike[1]


def test_what_a_step_shows_of_a_stage_counts_in_that_step():
    """In the first micro-batch one worker is odd, in the second each is."""
    step = Step(replicas=3)
    step.sends(1, 2, FORWARD, lie=1, micro_batches=0)
    step.sends(1, 1, FORWARD, lie=2, micro_batches=1)
    step.sends(1, 2, FORWARD, lie=3, micro_batches=1)
    trial = step.trial()
    assert not trial.proofs and trial.unlike.tolist() == [False, True, False, False]
    step.measures[:, FORWARD, 1, 2, 0] *= 1.1
    assert proved(step.trial()) == {(Worker(1, 2), FORWARD)}, "more than rounding is proved"


@pytest.mark.parametrize("replicas", [3, 5])
def test_more_than_can_be_bad_are_not_proved_in_one_step(replicas):
    step = Step(replicas=replicas, micro_batches=replicas)
    for column in range(replicas):
        step.sends(1, column, FORWARD, lie=1, micro_batches=column)
    trial = step.trial()
    assert not trial.proofs and trial.unlike.tolist() == [False, True, False, False]


def test_a_convicted_worker_keeps_no_stage_unlike():
    step = Step(replicas=5)
    step.unlike[1] = step.convicted[1, 4] = True
    step.sends(1, 4, FORWARD, lie=1)
    assert step.trial().alike[1]
    step.convicted[1, 4] = False
    assert not step.trial().alike[1]


@pytest.mark.parametrize(("replicas", "bad"), [(4, 1), (5, 2), (6, 2), (7, 3), (8, 3)])
def test_as_many_as_can_be_bad_make_no_stage_unlike(replicas, bad):
    for alike in (True, False):
        step = Step(replicas=replicas)
        for column in range(bad):
            step.sends(1, column, FORWARD, lie=1 if alike else 1 + column)
        trial = step.trial()
        assert proved(trial) == {(Worker(1, column), FORWARD) for column in range(bad)} and not trial.unlike.any()
        step = Step(replicas=replicas)
        step.disputed[FORWARD, 0, bad:-1] = True
        for column in range(bad):
            step.sends(1, column, FORWARD, lie=1 if alike else 1 + column)
        assert not step.trial().unlike.any(), "whoever of the honest is out before"


def test_columns_that_were_given_other_data_are_not_compared():
    step = Step(replicas=5)
    step.given[4] = False
    step.digests[..., 4, :, 0] += 77
    trial = step.trial()
    assert not trial.proofs and not trial.spoilt.any() and not trial.sound[:, 4].any() and trial.sound[:, :4].all()


def rounds_differently(step, stage, column, by):
    """Other hardware: other bits in all that follows too, statistics apart by ``by``."""
    step.kinds[stage, column] = 1
    step.sends(stage, column, FORWARD, lie=1)
    step.measures[:, FORWARD, stage:, column] *= 1 + by
    step.measures[:, BACKWARD, :, column] *= 1 + by
    step.gradients[:, column] += 1000
    step.norms[:, column] *= 1 + by


OTHER = [False, False, True]  # the column of those that round differently


def test_a_worker_on_other_hardware_is_left_out_and_not_blamed_for_it():
    step = Step()
    rounds_differently(step, 1, 2, by=1e-4)
    trial = step.trial()
    assert not trial.proofs and not trial.differences and trial.spoilt.tolist() == OTHER
    assert trial.right.all() and trial.same[:, :2].all(), "the others' reduction can be watched"
    assert trial.sound[:, :2].all() and not trial.sound[:, 2].any(), "gradients are its own word and clear nobody"
    assert trial.inexact == (Worker(1, 2),), "and none of those that were given what it made"


def test_who_claims_other_hardware_and_has_other_gradients_of_the_same_norm_is_named_for_it():
    step = Step()
    step.kinds[1, 2] = 1
    step.gradients[1, 2] += 1000
    trial = step.trial()
    assert not trial.proofs and trial.spoilt.tolist() == OTHER and trial.inexact == (Worker(1, 2),)


def test_who_claims_other_hardware_and_sends_the_same_bits_is_right_as_any_other():
    step = Step()
    step.kinds[1, 2] = 1
    trial = step.trial()
    assert not trial.spoilt.any() and trial.sound.all() and trial.same.all()


def test_of_two_replicas_on_unlike_hardware_none_is_left_out():
    step = Step(replicas=2)
    rounds_differently(step, 1, 1, by=1e-4)
    trial = step.trial()
    assert not trial.proofs and not trial.differences and not trial.spoilt.any()


def test_where_the_others_are_lost_a_worker_on_other_hardware_stays():
    step = Step()
    rounds_differently(step, 1, 2, by=1e-4)
    step.disputed[BACKWARD, 0, 0] = True
    assert not step.trial().spoilt.any()


def test_a_worker_on_other_hardware_is_still_bound():
    step = Step()
    rounds_differently(step, 1, 2, by=0.05)
    trial = step.trial()
    assert proved(trial) == {(Worker(1, 2), FORWARD)} and trial.spoilt.tolist() == OTHER


@pytest.mark.parametrize("end", [0, 1])
def test_one_end_alone_cannot_accuse_a_worker_on_other_hardware(end):
    step = Step()
    rounds_differently(step, 1, 2, by=1e-4)
    step.measures[end, FORWARD, 1, 2] *= 1.3
    trial = step.trial()
    assert not trial.proofs and trial.spoilt.tolist() == OTHER


@pytest.mark.parametrize("lie", [1.05, np.inf, np.nan])
def test_who_lies_about_the_truth_cannot_have_a_worker_on_other_hardware_proved(lie):
    step = Step()
    rounds_differently(step, 1, 2, by=1e-4)
    step.measures[0, FORWARD, 1, 0] *= lie  # (1, 0) of what it sent, (2, 1) of what it received
    step.measures[1, FORWARD, 1, 1] *= lie
    assert not step.trial().proofs


def test_behind_other_hardware_nobody_is_proved_by_statistics():
    # What (1, 2) sent was near the truth in all that is measured, and may still have been anything.
    step = Step(stages=5)
    rounds_differently(step, 1, 2, by=1e-4)
    step.measures[:, FORWARD, 2:, 2] *= 1.3
    step.norms[:, 2] *= 1.3
    trial = step.trial()
    assert proved(trial) == set() and trial.spoilt.tolist() == OTHER
    assert trial.undecided[FORWARD, 2, 2].all(), "statistics do not speak of it either"
    assert not trial.differences


def test_behind_other_hardware_that_sends_the_truth_wrong_work_is_proved():
    step = Step(stages=5)
    step.kinds[1, 2] = 1
    step.sends(2, 2, FORWARD, lie=3)
    assert proved(step.trial()) == {(Worker(2, 2), FORWARD)}


@pytest.mark.parametrize("norm", [1.05, np.inf, -np.inf, np.nan])
def test_wrong_gradients_on_other_hardware_show_in_their_norm(norm):
    step = Step()
    step.kinds[1, 2] = 1
    step.gradients[1, 2] += 1000
    step.norms[1, 2] = norm
    assert proved(step.trial()) == {(Worker(1, 2), None)}


def test_who_tells_the_right_norm_of_wrong_gradients_on_other_hardware_is_out_and_not_cleared():
    step = Step()
    step.kinds[1, 2] = 1
    step.gradients[1, 2] += 1000
    trial = step.trial()
    assert not trial.proofs and trial.spoilt.tolist() == OTHER and not trial.sound[1, 2]
    assert trial.same[:, :2].all()


def test_where_all_are_of_unlike_kinds_who_is_far_from_most_is_left_out():
    for kinds in ([1, 2, 3], [3, 2, 1]):  # the first of equally many kinds means nothing
        step = Step()
        step.kinds[1] = kinds
        step.sends(1, 1, FORWARD, lie=1)
        step.sends(1, 2, FORWARD, lie=3)
        step.measures[:, FORWARD, 1:, 2] *= 50
        trial = step.trial()
        assert not trial.proofs and trial.spoilt.tolist() == OTHER
        assert [one.workers for one in trial.differences if one.direction == FORWARD] == [(Worker(1, 2),)]


@pytest.mark.parametrize("kind", [0, 77])
def test_where_two_are_left_that_are_far_apart_both_are_out_whatever_kind_they_claim(kind):
    step = Step()
    step.kinds[1, 2] = kind
    step.sends(1, 2, FORWARD, lie=3)
    step.measures[:, FORWARD, 1:, 2] *= 50
    step.disputed[FORWARD, 1, 1] = True
    trial = step.trial()
    assert not trial.proofs and trial.spoilt.tolist() == [True, False, True]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_honest_worker_is_ever_proved_as_long_as_fewer_than_half_of_each_stage_are_bad(data):
    stages, replicas = data.draw(st.integers(2, 5)), data.draw(st.integers(2, 7))
    step = Step(stages, replicas, micro_batches=2)
    bad = set()
    for stage in range(stages):
        count = data.draw(st.integers(0, (replicas - 1) // 2))
        bad |= {(stage, one) for one in data.draw(st.permutations(range(replicas)))[:count]}
    # Bad workers send what they like, colluding or not, and may dispute what they receive.
    for stage, replica in sorted(bad):
        if stage < stages - 1 and data.draw(st.booleans()):
            step.sends(stage, replica, FORWARD, data.draw(st.integers(1, 3)))
        if stage and data.draw(st.booleans()):
            step.sends(stage, replica, BACKWARD, data.draw(st.integers(1, 3)), [data.draw(st.integers(0, 1))])
        if data.draw(st.booleans()):
            step.gradients[stage, replica] += data.draw(st.integers(1, 3))
        # They may make up messages that have the digest of the right one, and lie about what they receive, each for
        # itself: what a receiver and the sender before it agree on is another matter.
        if stage < stages - 1 and data.draw(st.booleans()):
            step.forges(stage, replica, FORWARD, data.draw(st.integers(4, 6)), [data.draw(st.integers(0, 1))])
        if stage and data.draw(st.booleans()):
            step.forges(stage, replica, BACKWARD, data.draw(st.integers(4, 6)))
        if stage and data.draw(st.booleans()):
            step.misreports(FORWARD, stage - 1, replica, lie=1 + replica)
        if stage < stages - 1 and data.draw(st.booleans()):
            step.misreports(BACKWARD, stage, replica, lie=1 + replica)
        if stage and data.draw(st.booleans()):
            step.disputed[FORWARD, stage - 1, replica, data.draw(st.integers(0, 1))] = True
        # They claim any kind, and what follows from what they sent may be anything.
        step.kinds[stage, replica] = data.draw(st.integers(0, 2))
        step.norms[stage, replica] = data.draw(st.sampled_from([1.0, 1.1, np.nan, np.inf]))
        if data.draw(st.booleans()):
            step.measures[:, FORWARD, stage:, replica] *= 1.3
            step.measures[:, BACKWARD, :, replica] *= 1.3
    trial = step.trial()
    assert {tuple(proof.worker) for proof in trial.proofs} <= bad
    for _, link, column, _ in np.argwhere(trial.forged).tolist():
        assert {(link, column), (link + 1, column)} & bad, "at odds are no two honest workers"


def test_behind_a_message_that_was_made_up_to_look_right_nobody_is_proved():
    step = Step(stages=5)
    step.forges(1, 2, FORWARD, lie=3)
    trial = step.trial()
    assert not trial.proofs and not trial.differences and trial.spoilt.tolist() == OTHER
    assert np.argwhere(trial.forged[..., 0]).tolist() == [[FORWARD, 1, 2]] and not trial.right[FORWARD, 1, 2].any()
    assert trial.sound[:, :2].all() and not trial.sound[1:, 2].any() and trial.same[:, :2].all()
    step.keyed = None
    assert proved(step.trial()) == {(Worker(2, 2), FORWARD)}, "by public digests alone an honest worker would be"


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_a_receiver_that_lies_has_nobody_proved_either(direction):
    step = Step()
    step.misreports(direction, 1, 2, lie=1)
    trial = step.trial()
    assert not trial.proofs and not trial.differences and trial.spoilt.tolist() == OTHER
    assert np.argwhere(trial.forged[..., 0]).tolist() == [[direction, 1, 2]]


def test_one_that_makes_up_a_message_and_one_that_lies_leave_no_majority_and_accuse_nobody():
    step = Step()
    step.forges(1, 2, FORWARD, lie=3)
    step.misreports(FORWARD, 1, 0, lie=1)
    trial = step.trial()
    assert not trial.proofs and not trial.forged.any() and not trial.differ.any()
    (told,) = trial.differences
    assert "say that they made the same forward messages, those behind them that they received different" in str(told)
    assert trial.spoilt.all() and trial.undecided[FORWARD, 1].all()


@pytest.mark.parametrize(("apart", "convicts"), [(0.007, False), (0.0085, True), (0.014, True)])
def test_of_two_replicas_the_suspect_is_wrong_beyond_rounding_and_not_twice_that(apart, convicts):
    step = Step(replicas=2)
    step.suspects[1, 1] = True
    step.sends(1, 1, FORWARD, lie=1)
    step.measures[:, FORWARD, 1, 1] *= 1 + apart
    assert bool(step.trial().proofs) == convicts


def test_what_nobody_can_tell_is_between_the_few_who_are_involved():
    """Three columns say one thing, which reached three: of each two of them a sender or a receiver is bad."""
    step = Step()
    step.forges(1, 2, FORWARD, lie=3)
    step.misreports(FORWARD, 1, 0, lie=1)
    events = {frozenset(map(tuple, np.argwhere(event).tolist())) for event in step.trial().open}
    pairs = ((0, 1), (0, 2), (1, 2))
    assert events == {frozenset((stage, column) for stage in (1, 2) for column in pair) for pair in pairs}


@pytest.mark.parametrize("bad", range(2))
def test_in_a_stage_of_two_kinds_who_is_apart_differs_from_each_of_the_others(bad):
    """The other one of its kind is no majority, and all that are near each other are believed."""
    step = Step(replicas=4)
    step.kinds[1] = [0, 0, 1, 1]
    for column in (2, 3):
        step.sends(1, column, FORWARD, lie=1)
    step.sends(1, bad, FORWARD, lie=5)
    step.measures[:, FORWARD, 1, bad] *= 1.02
    differ = step.trial().differ[1]
    alone = np.arange(4) == bad
    assert np.array_equal(differ, alone[:, None] != alone)


def test_who_differs_without_having_been_given_the_same_is_between_all_that_serve_the_two():
    step = Step(replicas=4)
    step.kinds[1] = [0, 0, 1, 2]
    for column in (2, 3):
        step.sends(1, column, FORWARD, lie=column)
    step.measures[:, FORWARD, 2, 3] *= 1.02
    step.kinds[2, 0] = 1
    step.sends(2, 0, FORWARD, lie=9)
    trial = step.trial()
    assert len(trial.open) and all(event[:, 3].all() and (event.sum(1) == 2).all() for event in trial.open)


def test_one_thing_that_alone_is_said_by_enough_is_the_truth():
    """Of four two columns may be wrong: one by its sender, one by its receiver."""
    step = Step(replicas=4)
    step.forges(1, 3, FORWARD, lie=3)
    step.misreports(FORWARD, 1, 0, lie=1)
    trial = step.trial()
    assert np.argwhere(trial.forged[FORWARD, 1, :, 0]).ravel().tolist() == [0, 3]
    assert not trial.open.size and not trial.proofs


def half_of_another_kind():
    step = Step(replicas=8)
    step.kinds[1, 4:] = 1
    for column in range(4, 8):
        step.sends(1, column, FORWARD, lie=3)
    return step


@pytest.mark.parametrize("who", ["isolated", "convicted"])
@pytest.mark.parametrize("end", [(1, 0), (2, 0)])
def test_who_has_no_word_leaves_nobody_else_out_by_it(who, end):
    """Four of eight columns can be compared to the last bit, too few to settle what one of them says that it got."""
    step = half_of_another_kind()
    step.misreports(FORWARD, 1, 0, lie=1)
    assert step.trial().spoilt[:4].all()
    getattr(step, who)[end] = True
    trial = step.trial()
    assert np.flatnonzero(trial.undecided[FORWARD, 1, :, 0]).tolist() == [0] and not trial.forged.any()
    assert {(1, 0), (2, 0)} <= set(map(tuple, np.argwhere(trial.open.any(0)))) or who == "convicted"


def test_those_who_have_none_do_not_leave_it_to_a_minority():
    step = half_of_another_kind()
    step.forges(1, 3, FORWARD, lie=1)
    step.isolated[1, :3] = True
    assert step.trial().undecided[FORWARD, 1, 3].all()


def test_of_two_replicas_that_look_alike_and_are_not_both_are_out_whoever_is_suspected():
    step = Step(replicas=2)
    step.suspects[1, 0] = True
    step.forges(1, 1, FORWARD, lie=3)
    trial = step.trial()
    assert not trial.proofs and not trial.forged.any() and trial.spoilt.all()


def test_colluding_senders_that_make_up_the_same_are_no_majority():
    step = Step(replicas=5)
    for column in (3, 4):
        step.forges(2, column, FORWARD, lie=3)
    trial = step.trial()
    assert not trial.proofs and trial.spoilt.tolist() == [False, False, False, True, True]


def test_only_the_micro_batches_that_were_made_up_are_lost():
    step = Step()
    step.forges(1, 2, FORWARD, lie=3, micro_batches=[1])
    step.sends(2, 0, FORWARD, lie=4, micro_batches=[0])
    assert proved(step.trial()) == {(Worker(2, 0), FORWARD)}


def test_without_a_truth_it_says_which_two_differ():
    step = Step(replicas=5)
    step.convicted[1, [3, 4]] = True
    for column in (3, 4):
        step.disputed[FORWARD, 0, column] = True
    step.sends(2, 0, FORWARD, lie=9)  # two of three agree, and three must where two may be bad
    trial = step.trial()
    assert not trial.proofs and [difference.workers for difference in trial.differences][:1] == [
        ((2, 0), (2, 1), (2, 2))
    ]
    assert np.argwhere(trial.differ).tolist() == [[2, 0, 1], [2, 0, 2], [2, 1, 0], [2, 2, 0]]
    assert not Step().trial().differ.any()


@pytest.mark.parametrize("replicas", [3, 4, 5])
def test_whoever_says_that_its_state_is_another_one_is_held_to_what_the_others_make(replicas):
    """Replicas were brought into one state before, so that is no excuse; nor is anybody spared who stands behind it."""
    step = Step(replicas=replicas)
    step.states[1] = [5] * (replicas - 1) + [6]
    step.sends(1, replicas - 1, FORWARD, lie=7)
    trial = step.trial()
    assert proved(step.trial()) == {(Worker(1, replicas - 1), FORWARD)} and not trial.blind
    behind = Step(replicas=replicas)
    behind.states[1] = step.states[1]
    behind.sends(2, replicas - 1, FORWARD, lie=7)
    assert proved(behind.trial()) == {(Worker(2, replicas - 1), FORWARD)}


def test_nobody_is_left_out_for_its_state():
    step = Step()
    step.states[1] = [5, 5, 6]
    trial = step.trial()
    assert not trial.proofs and not trial.spoilt.any() and trial.sound.all() and trial.same.all()


@pytest.mark.parametrize("states", [[5, 6], [5, 6, 7], [5, 5, 6, 7], [5, 5, 6, 6], [0, 0, 0], [0, 0, 5, 5]], ids=str)
def test_where_no_state_is_that_of_most_nobody_is_proved_and_nobody_left_out(states):
    """Two of three make the same of the same by chance, as running maxima that are clamped do."""
    step = Step(replicas=len(states))
    step.states[1] = states
    step.suspects[1, 1] = True
    step.sends(1, 1, FORWARD, lie=7)
    step.gradients[1, 0] += 1
    step.gradients[2, 1] += 1
    trial = step.trial()
    assert not trial.proofs and not trial.differences and not trial.spoilt.any()
    assert not trial.sound[1:].any() and trial.blind


def test_what_comes_before_a_stage_of_unlike_states_is_compared_as_ever():
    step = Step()
    step.states[2] = [5, 6, 7]
    step.sends(1, 2, FORWARD, lie=7)
    assert proved(step.trial()) == {(Worker(1, 2), FORWARD)}


def test_gradients_are_those_of_one_state_too():
    step = Step()
    step.states[3] = [5, 6, 7]
    step.gradients[3, 2] += 1000
    trial = step.trial()
    assert not trial.proofs and not trial.spoilt.any()
