"""What may be learnt from in steps in which something went wrong; links of four stages, two columns."""

import numpy as np
import pytest

from deepspeed_sentinel.judgement.clean import clean_links
from deepspeed_sentinel.mesh import BACKWARD, FORWARD

NOTHING = np.zeros((2, 3, 2, 2), bool)
NOBODY = np.zeros((4, 2), bool)


def message(direction, link, column=0, micro_batch=1):
    marked = NOTHING.copy()
    marked[direction, link, column, micro_batch] = True
    return marked


def learnt(blamed=NOTHING, disputes=NOTHING, contested=NOTHING, events=NOTHING, convicted=NOBODY):
    return clean_links(blamed, disputes, contested, events, convicted)


def of_first_column(clean):
    assert clean[:, :, 1].all(), "the other column has no event"
    return clean[:, :, 0].astype(int).tolist()


@pytest.mark.parametrize(
    "direction, link, forward, backward",
    [
        (FORWARD, 0, [0, 0, 0], [0, 0, 0]),
        (FORWARD, 1, [1, 0, 0], [0, 0, 0]),
        (FORWARD, 2, [1, 1, 0], [0, 0, 0]),
        (BACKWARD, 2, [1, 1, 1], [0, 0, 0]),
        # Stage 2 sent it, so what stage 2 sent forward is not clean, and so on.
        (BACKWARD, 1, [1, 1, 0], [0, 0, 0]),
        (BACKWARD, 0, [1, 0, 0], [0, 0, 0]),
    ],
)
def test_what_precedes_an_alarm_is_clean_but_for_its_senders_own(direction, link, forward, backward):
    alarm = message(direction, link)
    assert of_first_column(learnt(blamed=alarm, events=alarm)) == [forward, backward]


def test_the_cascade_does_not_spoil_what_was_before_its_beginning():
    events = message(FORWARD, 2) | message(BACKWARD, 2) | message(BACKWARD, 0)
    assert of_first_column(learnt(blamed=message(FORWARD, 2), events=events)) == [[1, 1, 0], [0, 0, 0]]


def test_of_a_dispute_neither_end_is_learnt_from():
    dispute = message(FORWARD, 1)
    assert of_first_column(learnt(disputes=dispute, events=dispute)) == [[1, 0, 0], [0, 0, 0]]
    dispute = message(BACKWARD, 1)
    assert of_first_column(learnt(disputes=dispute, events=dispute)) == [[1, 0, 0], [0, 0, 0]]


def test_of_neighbours_in_dispute_about_a_stage_neither_is_learnt_from():
    about_stage_2 = message(FORWARD, 2)
    clean = learnt(disputes=about_stage_2, contested=about_stage_2, events=about_stage_2)
    assert of_first_column(clean) == [[1, 0, 0], [0, 0, 0]], "stage 1 is one of the two"
    about_stage_2 = message(BACKWARD, 1)
    clean = learnt(disputes=about_stage_2, contested=about_stage_2, events=about_stage_2)
    assert of_first_column(clean) == [[1, 0, 0], [0, 0, 0]]


def test_work_that_an_alarm_was_traced_to_is_not_learnt_from():
    traced, alarm = message(FORWARD, 0), message(FORWARD, 1)
    assert of_first_column(learnt(blamed=traced, events=alarm)) == [[0, 0, 0], [0, 0, 0]]


def test_what_a_convicted_worker_had_a_hand_in_is_learnt_from_only_where_there_is_nothing_else():
    convicted = NOBODY.copy()
    convicted[2, 0] = True
    assert of_first_column(learnt(convicted=convicted)) == [[1, 1, 0], [0, 0, 0]]
    convicted[1, 1] = True
    assert learnt(convicted=convicted)[FORWARD].tolist() == [[1, 1], [1, 0], [1, 1]]
