"""What computing a step twice shows, and of whom."""

import numpy as np

from deepspeed_sentinel.judgement.replay import Replays
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker, identity

MESH = Mesh(4, 2)
WIRING = identity(MESH)


class Both:
    """Two times of one step, alike until a test changes them."""

    def __init__(self):
        self.differ, self.gradients = np.zeros((2, 2, 3, 2, 2), bool), np.zeros((4, 2), bool)

    def from_link(self, direction, link, column, ends=slice(None)):
        """What crosses that link differs, and with it all that follows."""
        self.differ[ends, direction, link, column, 1] = True
        if direction == FORWARD:
            self.differ[:, FORWARD, link + 1 :, column, 1] = True
            self.differ[:, BACKWARD, :, column, 1] = True
            self.gradients[:, column] = True
        else:
            self.differ[:, BACKWARD, :link, column, 1] = True
            self.gradients[: link + 1, column] = True
        return self


def replays():
    known = Replays(MESH)
    known.step(*vars(Both()).values(), WIRING)
    return known


def test_the_sender_of_the_first_message_that_differs_is_inconsistent():
    for direction, link, worker in (
        (FORWARD, 1, Worker(1, 0)),
        (BACKWARD, 1, Worker(2, 0)),
        (FORWARD, 0, Worker(0, 0)),
    ):
        outcome = replays().step(*vars(Both().from_link(direction, link, 0)).values(), WIRING)
        assert outcome.inconsistent == (worker,) and outcome.spoilt.tolist() == [True, False]


def test_gradients_that_differ_of_the_same_messages_are_their_workers():
    both = Both()
    both.gradients[2, 1] = True
    outcome = replays().step(*vars(both).values(), WIRING)
    assert outcome.inconsistent == (Worker(2, 1),) and outcome.spoilt.tolist() == [False, True]


def test_one_end_alone_accuses_nobody():
    outcome = replays().step(*vars(Both().from_link(FORWARD, 1, 0, ends=1)).values(), WIRING)
    assert outcome.inconsistent == () and outcome.spoilt.tolist() == [True, False]


def test_what_differs_in_the_first_replay_is_nature_and_accuses_nobody_later():
    known = Replays(MESH)
    first = known.step(*vars(Both().from_link(FORWARD, 1, 0)).values(), WIRING)
    assert first.inconsistent == () and known.unlike.tolist() == [False, True, False, False]
    assert known.step(*vars(Both().from_link(FORWARD, 1, 1)).values(), WIRING).inconsistent == ()
    assert known.step(*vars(Both().from_link(FORWARD, 0, 1)).values(), WIRING).inconsistent == (Worker(0, 1),)
