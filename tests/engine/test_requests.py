"""Who may ask for another action, what all ranks make of it, and the file of those who cannot touch the script."""

import os

import numpy as np
import pytest

from deepspeed_sentinel.config import ACTIONS, SentinelConfig
from deepspeed_sentinel.engine.controlfile import ControlFile
from deepspeed_sentinel.engine.requests import Decision, Requests
from deepspeed_sentinel.mesh import Mesh, Worker

MESH = Mesh(3, 2)
RANKS = np.arange(6).reshape(3, 2)
CONFIG = SentinelConfig.parse({"enabled": True})


def check(action):
    return CONFIG.with_action(action, MESH)


def word(action):
    return 1 + ACTIONS.index(action)


def decide(**asked):
    """Rank "r0", "r1", ... asks for an action, or says a number."""
    words = np.zeros(6, np.int64)
    for rank, said in asked.items():
        words[int(rank[1:])] = said if isinstance(said, int) else word(said)
    return Requests(MESH, RANKS, check).decide(words)


def test_a_request_is_told_once_and_the_last_of_several():
    requests = Requests(MESH, RANKS, check)
    assert requests.take_word() == 0
    requests.ask("halt")
    requests.ask("observe")
    assert [requests.take_word() for _ in range(2)] == [word("observe"), 0]


def test_what_the_config_would_refuse_cannot_be_asked_for():
    requests = Requests(MESH, RANKS, check)
    for action in ("ban", "", None, 1):
        with pytest.raises(ValueError, match="allowed are 'observe', 'exclude', 'quarantine', 'halt'"):
            requests.ask(action)
    assert requests.take_word() == 0


def test_any_rank_of_first_or_last_stage_decides_for_all():
    assert decide() is None
    for rank, worker in (("r0", (0, 0)), ("r1", (0, 1)), ("r4", (2, 0)), ("r5", (2, 1))):
        assert decide(**{rank: "observe"}) == Decision("observe", Worker(*worker), False, (), ())


def test_of_different_requests_that_of_the_lowest_rank_counts_and_the_others_are_named():
    decision = decide(r1="halt", r4="observe", r5="halt")
    assert decision == Decision("halt", Worker(0, 1), False, ((Worker(2, 0), "observe"),), ())


def test_a_worker_that_is_not_trusted_cannot_switch_the_guard_off():
    assert decide(r2="observe") == Decision(None, None, False, (), ((Worker(1, 0), "observe"),))
    assert decide(r3="observe", r5="halt").action == "halt"


def test_a_word_that_is_none_counts_for_nothing():
    assert decide(r0=5, r1=-1, r4=2**62) is None
    assert decide(r0=-(2**63), r5="observe").by == Worker(2, 1)


def test_ranks_need_not_be_in_the_order_of_stages():
    words = np.array([0, word("halt"), 0, 0, 0, word("observe")])
    turned = np.array([[5, 4], [3, 2], [1, 0]])
    assert Requests(MESH, turned, check).decide(words).by == Worker(2, 0)


@pytest.fixture
def file(tmp_path):
    """Writes control.json at another time each time, and says what is read of it."""

    class File:
        path, told, time = tmp_path / "control.json", [], 1_000_000_000

        def write(self, text):
            self.path.write_text(text)
            self.time += 1
            os.utime(self.path, ns=(self.time, self.time))

        def read(self, text):
            self.write(text)
            return control.read(check)

    made = File()
    control = made.control = ControlFile(made.path, made.told.append)
    return made


def test_a_file_is_read_when_it_changes(file):
    assert file.control.read(check) is None
    assert file.read('{"action": "observe"}') == "observe"
    assert file.control.read(check) is None, "once"
    assert file.read('{"action": "halt"}') == "halt" and file.read('{"action": "halt"}') == "halt"
    file.path.unlink()
    assert file.control.read(check) is None and file.read('{"action": "observe"}') == "observe"
    assert not file.told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"action": "obs', "no JSON"),
        ('{"action": "ban"}', "'ban', allowed are 'observe'"),
        ('{"action": null}', "a text"),
        ('{"action": "observe", "strikes": 1}', "the one key allowed is action"),
        ('["observe"]', "the one key allowed is action"),
        ("[" * 4000, "no JSON"),
        ('{"action": "observe"}' + " " * 5000, "longer than 4096 bytes"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "no JSON"),
    ],
)
def test_a_bad_file_is_told_of_once_and_ignored(file, text, said):
    assert file.read(text) is None and file.control.read(check) is None
    (line,) = file.told
    assert said in line and line.startswith(f"{file.path} is ignored: ")
    assert file.read('{"action": "observe"}') == "observe", "and the next one counts"


def test_a_folder_of_that_name_is_ignored(file):
    file.path.mkdir()
    assert file.control.read(check) is None and "is ignored" in file.told[0]


def test_what_an_earlier_run_was_told_does_not_hold_for_this_one(file):
    file.write('{"action": "observe"}')
    later = ControlFile(file.path, file.told.append)
    assert later.read(check) is None and "was there before this run" in file.told[0]
    file.write('{"action": "halt"}')
    assert later.read(check) == "halt"


def test_only_what_comes_from_the_file_is_said_to(file):
    requests = Requests(MESH, RANKS, check, file.control)
    file.write('{"action": "observe"}')
    asked = requests.take_word()
    assert requests.decide(np.array([asked, 0, 0, 0, 0, 0])).file
    assert not requests.decide(np.array([0, asked, 0, 0, 0, 0])).file, "another rank asked"
    requests.ask("observe")
    assert not requests.decide(np.array([requests.take_word(), 0, 0, 0, 0, 0])).file
