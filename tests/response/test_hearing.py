"""Hearings of five stages in five threads: the desk's sockets are real, barriers stand in for the control plane."""

import hmac
import socket
import struct
import threading
import time
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from accusation import COLUMN, CPU, LAYOUT, MESH, Case, finding, verdict
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence.keys import Keys
from deepspeed_sentinel.evidence.statement import WORDS
from deepspeed_sentinel.evidence.table import SENT
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.response import audit, hearing
from deepspeed_sentinel.response.audit import Outcome, audits_due
from deepspeed_sentinel.response.desk import _HEARD, Desk, frame_of, hand_in
from deepspeed_sentinel.response.hearing import Hearing

RANKS = np.arange(MESH.stages * MESH.replicas).reshape(MESH.stages, MESH.replicas)
MOST_BYTES = 1 << 20
PRIVATE = [X25519PrivateKey.generate() for _ in range(RANKS.size)]
PUBLIC = [key.public_key().public_bytes_raw() for key in PRIVATE]
LIAR = Worker(3, COLUMN)


class Gather:
    """The control plane between threads; ranks without a thread give zeros."""

    def __init__(self):
        self.barrier = threading.Barrier(MESH.stages)
        self.given = {}
        self.here = threading.local()

    def all_gather(self, mine):
        self.given[self.here.rank] = mine.clone()
        self.barrier.wait(timeout=20)
        said = torch.stack([self.given.get(rank, torch.zeros_like(mine)) for rank in range(RANKS.size)])
        self.barrier.wait(timeout=20)
        return said


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(hearing, "PATIENCE_SECONDS", 1.5)
    monkeypatch.setattr(hearing, "SHORT_PATIENCE_SECONDS", 0.2)


def hearings(case, gives=None):
    def testify(end):
        return case.first if end[1] == SENT else case.second

    return {
        stage: Hearing(
            Worker(stage, COLUMN),
            RANKS,
            None,
            CPU,
            testify=gives or testify,
            most_bytes=lambda: MOST_BYTES,
            secret_with=Keys(int(RANKS[stage, COLUMN]), PRIVATE[RANKS[stage, COLUMN]], PUBLIC).secret_with,
            towards="127.0.0.1",
        )
        for stage in range(MESH.stages)
    }


def hold(monkeypatch, case, said=None, sends=None, those=None):
    """What every stage's worker of the column learns, or the error that it ends with.

    ``sends(pieces, addresses, port)`` takes the place of what LIAR hands in.
    """
    gather, honest = Gather(), hearing.hand_in
    if sends:

        def hand_in(pieces, addresses, port, seconds):
            if gather.here.rank == RANKS[LIAR]:
                return sends(pieces, addresses, port)
            return honest(pieces, addresses, port, seconds)

        monkeypatch.setattr(hearing, "hand_in", hand_in)
    audits = audits_due(said or verdict(finding()), case.evidence)
    those = those or hearings(case)
    for one in those.values():
        one._control = gather
    learnt = {}

    def take_part(stage):
        gather.here.rank = int(RANKS[stage, COLUMN])
        try:
            learnt[stage] = those[stage].hold(audits, case.evidence, LAYOUT)
        except Exception as error:
            learnt[stage] = error
            if not isinstance(error, SentinelError):  # that one all raise
                gather.barrier.abort()

    threads = [threading.Thread(target=take_part, args=(stage,)) for stage in range(MESH.stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    monkeypatch.setattr(hearing, "hand_in", honest)
    return [learnt.get(stage) for stage in range(MESH.stages)]


def all_learn(outcome):
    return [(outcome,)] * MESH.stages


def raw(*pieces, wait=0.0):
    """Hand in these bytes."""

    def sends(_, addresses, port):
        with socket.create_connection((addresses[0], port)) as connection:
            try:
                for piece in pieces:
                    connection.sendall(piece)
                time.sleep(wait)
            except OSError:
                pass

    return sends


def mended(change):
    """Hand in the honest frame with other bytes in it, by a witness that knows its key and signs them."""

    def sends(pieces, addresses, port):
        statement, key = pieces.gi_frame.f_locals["statement"], pieces.gi_frame.f_locals["key"]
        raw(*change(statement, key))(None, addresses, port)

    return sends


def signed(words, body, key):
    header = np.asarray(words, "<i8").tobytes()
    yield header + hmac.digest(key, header, "sha256")
    yield body
    yield hmac.new(key, header + body, sha256).digest()


@pytest.mark.parametrize(("forged", "outcome"), [(1.0, Outcome.CONFIRMED), (-1.0, Outcome.REFUTED)])
def test_a_third_party_hears_both_neighbours_and_everybody_learns_its_outcome(monkeypatch, forged, outcome):
    assert hold(monkeypatch, Case(forged=forged)) == all_learn(outcome)


def test_a_neighbour_that_is_trusted_itself_sends_nothing(monkeypatch):
    case = Case()
    said = verdict(finding(worker=Worker(1, COLUMN), link=1))
    handed_in = []
    honest = hearing.hand_in
    monkeypatch.setattr(hearing, "hand_in", lambda *args: handed_in.append(args) or honest(*args))
    # The digests are of other links, so the auditor finds that its own message is not the one that crossed.
    assert hold(monkeypatch, case, said) == all_learn(Outcome.FIRST_FALSE)
    assert len(handed_in) == 1


@pytest.mark.parametrize("part", [0, 1])
def test_a_message_other_than_the_witness_reported_names_it(monkeypatch, part):
    case = Case()

    def gives(end):
        if end[1] == SENT:
            return case.first
        tensors = list(case.second.tensors)
        tensors[part] = tensors[part] + 1
        return replace(case.second, tensors=tuple(tensors))

    assert hold(monkeypatch, case, those=hearings(case, gives)) == all_learn(Outcome.SECOND_FALSE)


def test_neighbours_that_contradict_each_other_are_named_together(monkeypatch):
    case = Case()

    def gives(end):
        return case.first if end[1] == SENT else replace(case.second, seeds=(1, 2, 3))

    assert hold(monkeypatch, case, those=hearings(case, gives)) == all_learn(Outcome.REFUTED)


def of_another_version(statement, key):
    words = statement.header.to_words()
    words[0] = 99
    return signed(words, statement.body().numpy().tobytes(), key)


def endless(statement, key):
    words = statement.header.to_words()
    words[np.flatnonzero(words == 80)[0]] = 2**40  # 80 is the hidden size
    return signed(words, b"", key)


def negative(statement, key):
    words = statement.header.to_words()
    words[np.flatnonzero(words == 80)[0]] = -5
    return signed(words, b"", key)


def neither_true_nor_false(statement, key):
    odd = replace(statement, tensors=(*statement.tensors, torch.tensor([True])))
    return signed(odd.header.to_words(), odd.body().numpy().tobytes()[:-1] + b"\x07", key)


def empty_and_endless(statement, key):
    """No byte of it is announced, and its other sizes are more than anything can be computed with."""
    words = replace(statement, tensors=(statement.tensors[0], torch.zeros(0, 1, 1, 1))).header.to_words()
    (first,) = np.flatnonzero((words[:-3] == 0) & (words[1:-2] == 1) & (words[2:-1] == 1) & (words[3:] == 1))
    words[first : first + 4] = 2**20, 0, 2**20, 2**20
    return signed(words, replace(statement, tensors=statement.tensors[:1]).body().numpy().tobytes(), key)


@pytest.mark.parametrize("change", [of_another_version, endless, negative, neither_true_nor_false, empty_and_endless])
def test_a_signed_statement_that_is_none_names_who_signed_it(monkeypatch, change):
    assert hold(monkeypatch, Case(), sends=mended(change)) == all_learn(Outcome.SECOND_FALSE)


def cut_short(statement, key):
    header, body, _ = signed(statement.header.to_words(), statement.body().numpy().tobytes(), key)
    return header, body[: len(body) // 2]


def altered(statement, key):
    header, body, mac = signed(statement.header.to_words(), statement.body().numpy().tobytes(), key)
    return header, body[:-1] + bytes([body[-1] ^ 1]), mac


@pytest.mark.parametrize(
    "sends",
    [
        lambda *_: None,
        raw(),
        raw(b"\x00" * 20),
        raw(b"\x07" * (8 * WORDS + 32)),  # signed by nobody
        raw(struct.pack("<q", 2**62) * 100_000, wait=0.5),
        mended(cut_short),
        mended(altered),
    ],
)
def test_nothing_that_can_be_heard_is_an_outcome_by_name_and_the_run_goes_on(monkeypatch, sends):
    case, those = Case(), hearings(Case())
    start = time.monotonic()
    assert hold(monkeypatch, case, sends=sends, those=those) == all_learn(Outcome.SECOND_UNHEARD)
    first = time.monotonic() - start
    start = time.monotonic()
    assert hold(monkeypatch, case, sends=sends, those=those) == all_learn(Outcome.SECOND_UNHEARD)
    assert time.monotonic() - start < max(0.9, 0.9 * first), "whoever was silent once is not waited for as long again"
    assert hold(monkeypatch, case, those=those) == all_learn(Outcome.CONFIRMED), "it may speak again"


def test_more_bytes_than_announced_are_left_unread(monkeypatch):
    def talkative(statement, key):
        yield from frame_of(statement, key)
        yield b"x" * 1_000_000

    assert hold(monkeypatch, Case(), sends=mended(talkative)) == all_learn(Outcome.CONFIRMED)


def test_nobody_can_speak_in_anothers_name(monkeypatch):
    """A third worker calls first, with a frame that is right but for the key."""
    case = Case()
    stranger = Keys(0, PRIVATE[0], PUBLIC).secret_with(int(RANKS[0, COLUMN]))

    def sends(pieces, addresses, port):
        key = stranger.number("statement").to_bytes(32, "big")
        raw(*frame_of(replace(case.second, seeds=(1, 2, 3)), key))(None, addresses, port)
        return honest(pieces, addresses, port, 2.0)

    honest = hearing.hand_in
    assert hold(monkeypatch, case, sends=sends) == all_learn(Outcome.CONFIRMED)


def test_a_statement_handed_in_twice_is_heard_once():
    case, keys = Case(), {"first": b"1" * 32, "second": b"2" * 32}
    desk = Desk(keys, MOST_BYTES, CPU, dict.fromkeys(keys, 2.0))
    for seeds in (case.first.seeds, (1, 2, 3)):
        pieces = frame_of(replace(case.first, seeds=seeds), keys["first"])
        hand_in(pieces, ["127.0.0.1"], desk.port, 2.0)  # the second is cut off
        time.sleep(0.3)
    hand_in(frame_of(case.second, keys["second"]), ["127.0.0.1"], desk.port, 2.0)
    heard = desk.statements()
    desk.close()
    assert heard["first"].seeds == case.first.seeds and torch.equal(heard["second"].tensors[0], case.second.tensors[0])
    assert hand_in(frame_of(case.second, keys["second"]), ["127.0.0.1"], desk.port, 0.5), "the port should be closed"


def test_an_auditor_without_a_port_blames_nobody(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no port left")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert hold(monkeypatch, Case()) == all_learn(Outcome.OPEN)


def test_an_auditor_without_an_outcome_ends_the_run(monkeypatch):
    honest = Gather.all_gather

    def forgetful(self, mine):
        of_outcomes = mine.numel() == 8
        return honest(self, torch.zeros_like(mine) if of_outcomes else mine)

    monkeypatch.setattr(Gather, "all_gather", forgetful)
    for error in hold(monkeypatch, Case()):
        assert isinstance(error, SentinelError)
        assert "worker (stage 0, replica 1) gave no outcome of its audit of worker (stage 2, replica 1)" in str(error)


def test_whatever_goes_wrong_with_a_statement_is_its_witness_fault_and_ends_nothing(monkeypatch, caplog):
    look_again = audit.look_again

    def stumbles(statement, end, *more):
        if end[1] == SENT:
            return look_again(statement, end, *more)
        raise ZeroDivisionError("an empty image")

    monkeypatch.setattr(audit, "look_again", stumbles)
    assert hold(monkeypatch, Case()) == all_learn(Outcome.SECOND_FALSE)
    assert "ZeroDivisionError: an empty image" in caplog.text and str(LIAR) in caplog.text


def test_an_auditor_without_room_blames_nobody_for_it(monkeypatch):
    def no_room(*_):
        raise MemoryError

    monkeypatch.setattr(audit, "look_again", no_room)
    assert hold(monkeypatch, Case()) == all_learn(Outcome.FIRST_UNHEARD)


@pytest.mark.parametrize("idle", [64, 200])
def test_who_connects_and_says_nothing_keeps_nobody_out(idle):
    case = Case()
    desk = Desk({"first": b"1" * 32}, MOST_BYTES, CPU, {"first": 5.0})
    strangers = [socket.create_connection(("127.0.0.1", desk.port)) for _ in range(idle)]
    assert hand_in(frame_of(case.first, b"1" * 32), ["127.0.0.1"], desk.port, 5.0) is None
    assert desk.statements()["first"].seeds == case.first.seeds
    for stranger in strangers:
        stranger.close()
    desk.close()


def test_a_witness_that_is_hung_up_on_comes_again():
    case, heard = Case(), []
    frame = b"".join(frame_of(case.first, b"1" * 32))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def auditor():
            server.accept()[0].close()
            caller, _ = server.accept()
            with caller:
                while len(heard) < len(frame):
                    heard.extend(caller.recv(1 << 16))
                caller.sendall(_HEARD)

        thread = threading.Thread(target=auditor)
        thread.start()
        port = server.getsockname()[1]
        assert hand_in(frame_of(case.first, b"1" * 32), ["127.0.0.1"], port, 5.0) is None
        thread.join(timeout=10)
    assert bytes(heard) == frame
