"""Board and heart in a group of one rank, over a real store."""

import time
from datetime import timedelta

import numpy as np
import pytest
import torch.distributed as dist

from deepspeed_sentinel.engine import liveness as module
from deepspeed_sentinel.engine.board import Board
from deepspeed_sentinel.engine.liveness import Liveness
from deepspeed_sentinel.errors import LostWorker, SentinelError
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.mesh import Mesh, Worker
from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.who import Who

ALONE, RANKS = np.array([[0]]), np.array([[0], [0]])


@pytest.fixture
def heart(one_rank, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    heart = Liveness(Mesh(2, 1), RANKS, Control(ALONE))
    yield heart
    heart.stop()


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_an_attempt_reads_nothing_of_another(one_rank):
    first, second = Board(Control(ALONE), 1.0), Board(Control(ALONE), 1.0)
    first.post("failed")
    assert first.read_post([0]) == (0, "failed")
    assert second.read_post([0]) is None


def test_the_first_post_stands(one_rank):
    board = Board(Control(ALONE), 1.0)
    board.write_beat("7")
    board.post("first")
    assert board.read_beats([0]) == {0: "7"} and board.read_post([0]) == (0, "first")


@pytest.mark.parametrize("forge", ["text", "kind", "garbage"])
def test_a_line_that_its_rank_did_not_sign_counts_as_none(one_rank, forge):
    board = Board(Control(ALONE), 1.0)
    board.write_beat("7")
    beat, post = board._key("beat", 0), board._key("post", 0)
    line = one_rank.get(beat).decode()
    one_rank.set(f"{board._prefix}/posts", "1")
    if forge == "text":
        one_rank.set(beat, line[:128] + "8")
    if forge == "kind":
        one_rank.set(post, line)
    if forge == "garbage":
        one_rank.set(beat, "ffff")
        one_rank.set(post, "\u00e4" * 200)
    assert board.read_beats([0]) == ({} if forge != "kind" else {0: "7"})
    assert board.read_post([0]) is None


def test_an_error_of_the_store_does_not_silence_a_heart(heart):
    elsewhere = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    client = dist.TCPStore("127.0.0.1", elsewhere.port, is_master=False, wait_for_workers=False)
    del elsewhere
    heart._board._connection = client
    assert until(lambda: heart._board._connection is not client)
    before = heart._read_beats()[0].count
    assert until(lambda: heart._read_beats()[0].count > before + 3)


def test_what_one_rank_told_ends_the_next_call_of_another(heart):
    heart._board.post("rank 5 failed")
    assert until(lambda: heart._failure)
    with pytest.raises(LostWorker, match=r"rank 5 failed \(said by rank 0 = worker"):
        heart.watched(lambda: None)()


def test_a_users_error_stays_what_it_is_and_is_told(heart):
    def fail():
        raise RuntimeError("cannot store the batch: connection timed out")

    with pytest.raises(RuntimeError, match=r"^cannot store"):
        heart.watched(fail)()
    assert until(lambda: heart._failure) and " failed: RuntimeError: cannot store" in heart._failure


def test_what_people_read_names_workers_in_full(one_rank, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    who = Who(np.array([[0], [1]]), [[Device("node-a", 0, name="cpu")], [Device("node-b", 1, name="cpu")]])
    heart = Liveness(Mesh(2, 1), RANKS, Control(ALONE), fill=who.fill)

    def fail():
        raise SentinelError(f"what {Worker(1, 0)} said came in two versions")

    try:
        with pytest.raises(SentinelError, match=r"^what stage 1, replica 0 \(rank 1, node-b, cpu\) said"):
            heart.watched(fail)()
        assert until(lambda: heart._failure)
        with pytest.raises(LostWorker, match=r"stopped: what stage 1, replica 0 \(rank 1, node-b, cpu\) said"):
            heart.watched(lambda: None)()
    finally:
        heart.stop()
