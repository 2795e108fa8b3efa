import errno
import fcntl
import json
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from deepspeed_sentinel.telemetry import bookfile
from deepspeed_sentinel.telemetry.book import COLUMNS, LATEST, PLACES
from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.ledger import Ledger

DEVICES = [[Device("node", 0)], [Device("node", 1)]]


def step(alarms):
    zeros = np.zeros((2, 1), np.int64)
    return {
        "judged": zeros + 4,
        "alarms": np.array([[alarms], [0]]),
        "disputes": zeros,
        "proofs": zeros,
        "unequal_weights": zeros,
    }


def alarms(ledger):
    return {one.key: one.alarms for one in ledger.standings()}


def written(path, number=3):
    ledger = Ledger(path, DEVICES)
    ledger.record(**step(number))
    assert ledger.write()
    return ledger


# A ledger of devices that are given never asks torch, which takes seconds to load.
WRITER = textwrap.dedent("""
    import sys, types
    from pathlib import Path
    import numpy as np
    sys.modules["torch"] = types.ModuleType("torch")
    from deepspeed_sentinel.telemetry.devices import Device
    from deepspeed_sentinel.telemetry.ledger import Ledger

    ledger = Ledger(Path(sys.argv[1]), [[Device("node", 0)], [Device("node", 1)]])
    zeros = np.zeros((2, 1), np.int64)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(int(sys.argv[2])):
        ledger.record(judged=zeros + 4, alarms=zeros + 1, disputes=zeros, proofs=zeros, unequal_weights=zeros)
        assert ledger.write(), ledger.told()
    assert not ledger.told()
""")


def start_writer(path, steps):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(steps)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "ledger.json"
    here = Ledger(path, DEVICES)
    other = start_writer(path, 30)
    other.stdin.write("go\n")
    other.stdin.flush()
    for _ in range(30):
        here.record(**step(1))
        assert here.write()
    assert other.wait(timeout=60) == 0
    here.write()
    assert alarms(here) == alarms(Ledger(path, DEVICES)) == {"cpu:node/0": 60, "cpu:node/1": 30}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["ledger.json", "ledger.json.lock"]


def test_a_writer_that_is_killed_leaves_a_whole_file_and_no_lock(tmp_path):
    path = tmp_path / "ledger.json"
    other = start_writer(path, 1_000_000)
    other.stdin.write("go\n")
    other.stdin.flush()
    while not path.exists():
        assert other.poll() is None
        time.sleep(0.01)
    other.kill()
    other.wait(timeout=60)
    (tmp_path / "ledger.json.0123abcd.tmp").write_text("half a led")
    ledger = Ledger(path, DEVICES)
    assert ledger.write() and not ledger.told()
    assert alarms(ledger)["cpu:node/0"] >= 1
    assert sorted(one.name for one in tmp_path.iterdir()) == ["ledger.json", "ledger.json.lock"]


GOOD_ROW = [1] * len(COLUMNS)
PLACE = {"host": "node", "slot": 0, "pci": "", "last": 1}


def ledger_text(**changes):
    entry = {"runs": ["a"], "counts": {"cpu:node/0": GOOD_ROW}}
    good = {"schema": 1, "columns": list(COLUMNS), "devices": {"cpu:node/0": {"places": [PLACE]}}, "entries": [entry]}
    return json.dumps({**good, **changes})


BROKEN = {
    "empty": "",
    "torn": ledger_text()[:-40],
    "binary": "\x00\x01",
    "deep": "[" * 100_000,
    "list": "[]",
    "no schema": "{}",
    "true schema": ledger_text(schema=True),
    "schema 0": ledger_text(schema=0),
    "columns": ledger_text(columns=["judged"]),
    "devices": ledger_text(devices=[]),
    "name": ledger_text(devices={"\x1b[2J": {"places": []}}),
    "long name": ledger_text(devices={"x" * 500: {"places": []}}),
    "places": ledger_text(devices={"cpu:node/0": {"places": [PLACE] * (PLACES + 1)}}),
    "place": ledger_text(devices={"cpu:node/0": {"places": [{**PLACE, "slot": -1}]}}),
    "host": ledger_text(devices={"cpu:node/0": {"places": [{**PLACE, "host": "a b"}]}}),
    "entries": ledger_text(entries={}),
    "no runs": ledger_text(entries=[{"runs": [], "counts": {}}]),
    "run": ledger_text(entries=[{"runs": [7], "counts": {}}]),
    "twice": ledger_text(entries=[{"runs": ["a"], "counts": {}}] * 2),
    "short": ledger_text(entries=[{"runs": ["a"], "counts": {"cpu:node/0": [1, 2]}}]),
    "negative": ledger_text(entries=[{"runs": ["a"], "counts": {"cpu:node/0": [*GOOD_ROW[1:], -1]}}]),
    "NaN": ledger_text(entries=[{"runs": ["a"], "counts": {"cpu:node/0": [*GOOD_ROW[1:], float("nan")]}}]),
    "huge": ledger_text(entries=[{"runs": ["a"], "counts": {"cpu:node/0": [*GOOD_ROW[1:], 1 << 60]}}]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_is_no_ledger_is_set_aside_and_the_run_goes_on(what, tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text(BROKEN[what])
    ledger = written(path)
    (told,) = ledger.told()
    assert f"{path} cannot be read as a ledger: " in told and "ledger.json.broken-1" in told
    assert told.isprintable()
    assert (tmp_path / "ledger.json.broken-1").read_text() == BROKEN[what]
    assert alarms(Ledger(path, DEVICES))["cpu:node/0"] == 3


def test_a_file_that_breaks_again_does_not_take_the_place_of_what_was_set_aside(tmp_path):
    path = tmp_path / "ledger.json"
    ledger = written(path)
    for number in (1, 2):
        path.write_text(f"broken {number}")
        ledger.record(**step(1))
        assert ledger.write()
        assert (tmp_path / f"ledger.json.broken-{number}").read_text() == f"broken {number}"
    assert len(ledger.told()) == 2
    assert alarms(Ledger(path, DEVICES))["cpu:node/0"] == 5  # all that the run itself knew is there again


def test_a_good_file_of_other_hands_is_taken(tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text(ledger_text())
    ledger = written(path)
    assert alarms(ledger)["cpu:node/0"] == 4 and not ledger.told()


def test_a_later_versions_file_is_left_as_it_is(tmp_path):
    path, beside = tmp_path / "ledger.json", tmp_path / "ledger.schema-1.json"
    later = '{"schema": 2, "devices": "in a form of its own"}'
    path.write_text(later)
    ledger = written(path)
    (told,) = ledger.told()
    assert "schema 2" in told and str(beside) in told and "update deepspeed_sentinel" in told
    assert path.read_text() == later and alarms(ledger)["cpu:node/0"] == 3
    again = written(path, 4)
    assert path.read_text() == later and alarms(again)["cpu:node/0"] == 7
    assert json.loads(beside.read_text())["devices"]["cpu:node/0"]["total"]["alarms"] == 7


def test_an_update_of_another_run_in_the_middle_of_this_one(tmp_path):
    path = tmp_path / "ledger.json"
    ledger = written(path)
    path.write_text('{"schema": 2}')
    ledger.record(**step(1))
    assert ledger.write() and path.read_text() == '{"schema": 2}'
    assert alarms(Ledger(path, DEVICES))["cpu:node/0"] == 4


def test_a_lock_that_nobody_gives_back_holds_up_one_writing_and_not_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(bookfile, "_PATIENCE", 0.2)
    path = tmp_path / "ledger.json"
    ledger = written(path)
    with (tmp_path / "ledger.json.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ledger.record(**step(1))
        assert not ledger.write()
        assert "the ledger was not written" in ledger.told()[0]
        late = Ledger(path, DEVICES)
        assert "the ledger is read later" in late.told()[0] and not late.standings()
    assert ledger.write() and alarms(Ledger(path, DEVICES))["cpu:node/0"] == 4
    late.record(**step(2))
    assert late.write() and alarms(late)["cpu:node/0"] == 6


def test_without_locks_it_is_told_once_and_written_all_the_same(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(bookfile.fcntl, "flock", no_locks)
    ledger = written(tmp_path / "ledger.json")
    ledger.write()
    (told,) = ledger.told()
    assert "cannot be locked" in told and alarms(Ledger(tmp_path / "ledger.json", DEVICES))["cpu:node/0"] == 3


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    ledger = written(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bookfile.os, "fsync", full)
        ledger.record(**step(1))
        with pytest.raises(OSError, match="No space left"):
            ledger.write()
    assert path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    assert ledger.write() and alarms(Ledger(path, DEVICES))["cpu:node/0"] == 4


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Ledger(tmp_path / "file" / "ledger.json", DEVICES)


def test_the_file_is_for_people_too(tmp_path):
    written(tmp_path / "ledger.json")
    text = (tmp_path / "ledger.json").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith('"cpu:node/0": {')]
    assert '"total": {"steps": 1, "judged": 4, "alarmed_steps": 1, "alarms": 3,' in line and '"host": "node"' in line
    assert json.loads(text)["schema"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"slot": 70_000},
        {"slot": True},
        {"pci": "a" * 40},
        {"host": "h" * 129},
        {"host": "a b"},
        {"host": 3},
        {"last": LATEST + 1},
        {"times": LATEST + 1},
    ],
)
def test_what_no_device_and_no_clock_can_say_is_not_read(change):
    def text(host="h", slot=0, pci="", last=1, times=2):
        place = {"host": host, "slot": slot, "pci": pci, "last": last}
        counts = {"gpu:z": [10, 10, 0, 0, 0, 1, 0, 1, times, times]}
        devices = {"gpu:z": {"places": [place]}}
        entries = [{"runs": ["r1"], "counts": counts}]
        return json.dumps({"schema": 1, "columns": list(COLUMNS), "devices": devices, "entries": entries}).encode()

    def loaded(**place):
        ledger = Ledger(None, DEVICES)
        ledger.load_state_dict({"json": np.frombuffer(text(**place), np.uint8)})
        return ledger, ledger.told(), [str(one) for one in ledger.standings()]

    ledger, told, standings = loaded(times=LATEST, last=LATEST, slot=65_535, pci="a" * 32, host="h" * 128)
    assert not told and "9999" in standings[0] and not ledger.report()
    _, told, standings = loaded(**change)
    assert "left out" in told[0] and not standings
