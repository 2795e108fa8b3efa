"""Reads what strangers may have written: keeps what fits, tells the rest, and never breaks on it."""

import json

import pytest

from deepspeed_sentinel.mesh import Mesh, Worker
from deepspeed_sentinel.telemetry.report.digest import digest
from deepspeed_sentinel.telemetry.report.heat import heat
from deepspeed_sentinel.telemetry.report.page import render
from deepspeed_sentinel.telemetry.report.reading import read_run

START = {"kind": "start", "step": 0, "schema_version": 1, "run_id": "a", "mesh": {"stages": 3, "replicas": 2},
         "config": {}, "injecting": False}  # fmt: skip
ALARM = {
    "kind": "alarm", "step": 5, "time": 17e8, "schema_version": 1, "run_id": "a", "stage": 1, "replica": 1,
    "direction": "forward", "link": 1, "micro_batches": [0], "statistic": "energy", "value": 1.0, "residual": 9.0,
    "low": -1.0, "high": 1.0, "score": 9.0, "trusted": False, "overflow": False, "cause": "fences", "strikes": True,
    "audit": None, "who": [{"stage": 1, "replica": 1, "rank": 3, "local_rank": 1, "host": "h", "device": "cpu"}],
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    def write_and_read(*lines, **more):
        texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (tmp_path / "events.jsonl").write_bytes(b"\n".join(texts))
        for name, content in more.items():
            (tmp_path / f"{name}.json").write_bytes(content)
        run = read_run(tmp_path)
        document = digest(run)
        json.dumps(document, allow_nan=False)
        # Whatever was let through, a page can be made of it.
        render(document, heat(run, document["run"]["first_step"], document["run"]["last_step"]), {})
        return run

    return write_and_read


def test_what_a_run_writes_is_read_whole(recorded):
    folder = recorded()
    run = read_run(folder)
    lines = (folder / "events.jsonl").read_text().splitlines()
    assert run.notes == [] and run.mesh == Mesh(4, 3) and run.run_id == "run-1"
    assert [event["kind"] for event in run.events] == [json.loads(line)["kind"] for line in lines]
    assert run.places[Worker(1, 2)]["host"] == "node-03" and len(run.places) == 12
    assert run.exclude["hosts"] == ["node-03"] and len(run.devices) == 12


def test_a_torn_last_line_is_told_and_the_rest_stays(read):
    run = read(START, ALARM, json.dumps(ALARM)[:60].encode())
    assert [event["kind"] for event in run.events] == ["start", "alarm"]
    assert len(run.notes) == 1 and "torn" in run.notes[0]


def test_broken_lines_between_are_counted(read):
    run = read(START, b"\xff\xfe{", b"[1, 2]", b"[" * 100_000, b'{"kind": 3, "step": 1}', b'{"kind": "halt"}', ALARM)
    assert len(run.events) == 2 and "5 lines" in run.notes[0] and "line 2" in run.notes[0]


def test_another_schema_is_read_as_far_as_it_fits_and_told(read):
    run = read(START, {**ALARM, "schema_version": 9, "colour": "blue"}, {"kind": "dance", "step": 6, "run_id": "a"})
    assert [event["kind"] for event in run.events] == ["start", "alarm"]
    assert any("schema_version 9" in note for note in run.notes)
    assert any("1 x dance" in note for note in run.notes)


@pytest.mark.parametrize(
    "wrong",
    [{"stage": 3}, {"replica": -1}, {"stage": True}, {"micro_batches": 3}, {"score": "high"}, {"direction": None},
     {"link": 2.5}, {"value": 10**400}, {"audit": [1]}],
)  # fmt: skip
def test_a_field_that_does_not_fit_leaves_the_event_out(read, wrong):
    run = read(START, {**ALARM, **wrong})
    assert [event["kind"] for event in run.events] == ["start"] and "1 x alarm" in run.notes[0]


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "step", "scores": [[1.0, 2.0]], "excluded": [], "warming_up": False},
        {"kind": "step", "scores": [[1, 2]] * 3, "excluded": [2], "warming_up": False},
        {"kind": "excluded", "columns": [7]},
        {"kind": "wiring", "moved": [[1, 0, 0, 5]]},
        {"kind": "wiring", "moved": [[1, 0]]},
        {"kind": "twins", "suspects": [[9, 9]]},
        {"kind": "end", "counts": {"steps": "many"}, "convicted": [], "since_conviction": []},
    ],
)
def test_what_is_outside_the_mesh_is_left_out(read, event):
    assert [one["kind"] for one in read(START, {"step": 1, "run_id": "a", **event}).events] == ["start"]


def test_numbers_that_json_does_not_know_are_none(read):
    line = json.dumps({**ALARM, "value": 0}).replace('"value": 0', '"value": NaN').replace("9.0", "1e999").encode()
    (_, alarm) = read(START, line).events
    assert alarm["value"] is None and alarm["score"] is None


def test_a_run_without_a_start_has_the_smallest_mesh_that_fits(read):
    run = read(ALARM)
    assert run.mesh == Mesh(2, 2) and len(run.events) == 1 and "taken for 2 stages x 2 replicas" in run.notes[0]


def test_a_mesh_that_no_memory_holds_is_not_believed(read):
    assert read({**START, "mesh": {"stages": 10**9, "replicas": 10**9}}, ALARM).mesh == Mesh(2, 2)


def test_the_last_run_is_read_and_those_before_are_listed(tmp_path, recorded):
    folder = recorded(run_id="first")
    recorded(run_id="second")
    run = read_run(folder)
    assert run.run_id == "second" and [one["run_id"] for one in run.earlier] == ["first"]
    assert run.earlier[0]["convicted"] == [[1, 2]] and run.earlier[0]["mesh"] == [4, 3]
    assert read_run(folder, "first").earlier == []
    with pytest.raises(ValueError, match=r"--run third: .* tells of first, second"):
        read_run(folder, "third")


def test_lines_of_before_there_were_ids_are_parted_by_their_starts(read):
    old = {name: value for name, value in START.items() if name not in ("run_id", "schema_version")}
    assert read(old, old).run_id == "unnamed-2"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"devices": 3, "deepspeed": 4, "hostfile": "no"}'])
def test_other_files_may_be_broken(read, content):
    run = read(START, ALARM, ledger=content, exclude=content)
    assert run.devices == {} and len(run.events) == 2


def test_a_folder_without_events_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match="output_dir"):
        read_run(tmp_path)
    (tmp_path / "events.jsonl").write_text("")
    with pytest.raises(ValueError, match="it is empty"):
        read_run(tmp_path)


def test_a_line_that_lacks_a_field_of_today_is_not_lost(read):
    """Convictions of before ``proved`` was told: who was convicted is what a report is for."""
    old = {"kind": "conviction", "step": 6, "stage": 1, "replica": 1, "why": "it was", "run_id": "a"}
    run = read(START, ALARM, old)
    assert run.events[-1]["kind"] == "conviction" and run.events[-1]["proved"] is None
    assert digest(run)["state"] == "convicted"
