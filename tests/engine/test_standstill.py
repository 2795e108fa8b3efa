"""Who holds up a run that stands still: mesh of two stages and two replicas, seconds as one rank sees them."""

import numpy as np
import pytest
from deepspeed.runtime.pipe import schedule

from deepspeed_sentinel.engine.progress import BEGIN, OUTSIDE, PIPELINE, REDUCE, TIED, Place, Progress
from deepspeed_sentinel.engine.standstill import Beat, Standstill
from deepspeed_sentinel.mesh import Mesh, Worker, identity

WORKERS = {0: Worker(0, 0), 1: Worker(0, 1), 2: Worker(1, 0), 3: Worker(1, 1)}
OWN = identity(Mesh(2, 2))
SILENCE, PATIENCE, EVERY = 30.0, 100.0, 5.0
GATE = ("ReduceTiedGrads", TIED)


def place(what, phase=PIPELINE, call=8):
    return Place(moves=call * 100 + phase, call=call, phase=phase, step=call - 1, what=what)


def watch(places, rank, silent=(), ended=(), seconds=300.0, changes=None, workers=WORKERS, wiring=OWN):
    """What ``rank`` says, and after how many seconds, if every rank stays where it is."""
    standstill = Standstill(workers, rank, SILENCE, lambda _: PATIENCE, lambda step: wiring)
    passed = 0.0
    while passed < seconds:
        count = int(passed)
        beats = {
            other: Beat(0 if other in silent else count, where, other in ended)
            for other, where in ({**places, **changes(passed)} if changes else places).items()
        }
        text = standstill.look(EVERY, beats)
        if text:
            return text, passed
        passed += EVERY
    return None, passed


WAITING = {0: place("RecvGrad"), 1: place(*GATE), 2: place("RecvActivation"), 3: place(*GATE)}


def test_a_silent_rank_that_all_wait_for_is_lost_after_a_short_while():
    text, after = watch({**WAITING, 2: place("ForwardPass")}, rank=0, silent={2})
    assert text.startswith("lost rank 2 = worker (stage 1, replica 0): no heartbeat for 30 s, and everybody waits")
    assert (
        "last seen in ForwardPass of step 7" in text
        and "rank 0 = worker (stage 0, replica 0) waited in RecvGrad" in text
    )
    assert after == SILENCE


def test_a_rank_that_lives_and_holds_the_others_up_is_stuck_only_after_the_long_patience():
    text, after = watch({**WAITING, 0: place("LoadMicroBatch")}, rank=3)
    assert text.startswith("stuck: rank 0 = worker (stage 0, replica 0) in LoadMicroBatch of step 7, for which")
    assert after == PATIENCE


@pytest.mark.parametrize("what", ["LoadMicroBatch", "ForwardPass"])
def test_silence_counts_for_little_while_another_rank_has_work(what):
    """A rank whose main thread blocks its heart may be waiting for the one that loads data."""
    text, after = watch({**WAITING, 0: place(what)}, rank=3, silent={2})
    assert after == PATIENCE and "rank 0" in text and "rank 2 = worker (stage 1, replica 0) in RecvActivation" in text


def test_a_rank_in_the_scripts_own_code_is_waited_for_as_long():
    idle = {rank: place("LoadMicroBatch" if rank == 0 else "RecvActivation") for rank in WORKERS}
    idle |= {3: place("the script's own code", OUTSIDE, call=7), 1: place("RecvGrad")}
    text, after = watch({**idle, 0: place("RecvGrad")}, rank=1)
    assert (
        after == PATIENCE and "stuck: rank 3 = worker (stage 1, replica 1) in the script's own code of step 6" in text
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_who_computes_accuses_nobody(rank):
    busy = {**WAITING, rank: place("ForwardPass")}
    assert watch(busy, rank=rank, silent={1, 3})[0] is None


def test_as_long_as_anybody_gets_on_nobody_is_accused():
    def loads(passed):
        return {0: Place(900 + int(passed // 60), 8, PIPELINE, 7, "LoadMicroBatch")}

    assert watch(WAITING, rank=3, silent={2}, changes=loads)[0] is None


def test_a_script_that_ended_is_as_good_as_gone():
    text, after = watch({**WAITING, 2: place("the script's own code", OUTSIDE, call=7)}, rank=0, ended={2})
    assert text.startswith("lost rank 2") and after == SILENCE


def test_ranks_that_wait_for_each_other_name_nobody():
    text, after = watch(dict.fromkeys(WORKERS, place(*GATE)), rank=1)
    assert (
        text.startswith("stuck: ranks wait for each other, so none is named; furthest behind: rank 0")
        and after == PATIENCE
    )
    crossed = {**WAITING, 0: place("SendActivation"), 2: place("SendGrad")}
    assert "furthest behind: rank 0 = worker (stage 0, replica 0) in SendActivation" in watch(crossed, rank=1)[0]


def test_a_rank_without_a_line_of_its_own_is_silent():
    three = {rank: where for rank, where in WAITING.items() if rank != 2}
    assert watch(three, rank=0)[0].startswith("lost rank 2")


def test_progress_counts_calls_and_names_instructions():
    progress, seen = Progress(step=lambda: 4), []
    run = progress.tracked(
        {kind: lambda: seen.append(progress.place) for kind in (schedule.LoadMicroBatch, schedule.ReduceGrads)}
    )
    progress.enter()
    seen.append(progress.place)
    run[schedule.LoadMicroBatch]()
    run[schedule.ReduceGrads]()
    progress.leave()
    seen.append(progress.place)
    assert [(one.phase, one.what, one.call) for one in seen] == [
        (BEGIN, "the beginning", 1),
        (PIPELINE, "LoadMicroBatch", 1),
        (REDUCE, "ReduceGrads", 1),
        (OUTSIDE, "the script's own code", 1),
    ]
    assert [one.moves for one in seen] == [1, 2, 3, 4]
    assert all(Place.from_text(one.to_text()) == one for one in seen) and str(seen[1]) == "LoadMicroBatch of step 4"
    beat = Beat(9, seen[3], ended=True)
    assert Beat.from_text(beat.to_text()) == beat and Beat.from_text("") is None and Beat.from_text("1 2 x") is None


def test_a_rank_waits_for_the_worker_that_its_column_has_now():
    """Rank 2, worker (1, 0), serves column 1 there: it waits for (0, 1), and (2, 1) for it."""
    workers = {rank: Worker(*divmod(rank, 2)) for rank in range(6)}
    wiring = np.array([[0, 1], [1, 0], [0, 1]])
    places = {rank: place(*GATE) for rank in workers} | {2: place("RecvActivation"), 1: place("LoadMicroBatch")}
    text, _ = watch(places, rank=2, workers=workers, wiring=wiring)
    assert text.startswith("stuck: rank 1 = worker (stage 0, replica 1) in LoadMicroBatch"), text
    places = {rank: place(*GATE) for rank in workers} | {5: place("RecvActivation"), 2: place("ForwardPass")}
    text, _ = watch(places, rank=5, workers=workers, wiring=wiring)
    assert text.startswith("stuck: rank 2 = worker (stage 1, replica 0) in ForwardPass"), text
