"""What events hold, that they are strict JSON, and that docs/events.md says so."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import CULPRIT, blamed

from deepspeed_sentinel.evidence.weights import Comparison, divisions
from deepspeed_sentinel.judgement.trial import Proof
from deepspeed_sentinel.judgement.verdict import Dispute
from deepspeed_sentinel.mesh import FORWARD, Worker
from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.eventlog import EventLog, strict_json
from deepspeed_sentinel.telemetry.events import EVENTS, Alarm, Conviction, Event, Start
from deepspeed_sentinel.telemetry.findings import device_event, verdict_events, weights_events, wiring_event
from deepspeed_sentinel.telemetry.standing import Above, Standing
from deepspeed_sentinel.telemetry.who import Who

NONE = np.zeros((4, 3), bool)
UUID = "1a2b3c4d-64d7-4f0a-a1c9-b2570c9d8e44"
DEVICES = [[Device(f"node-{stage}", replica, name="cpu") for replica in range(3)] for stage in range(4)]
DEVICES[1][2] = Device("node-03", 3, UUID, "00000000:1b:00", "cuda:3")
WHO = Who(np.arange(12).reshape(4, 3), DEVICES)
PLACE = {
    "stage": 1, "replica": 2, "rank": 5, "local_rank": 3, "host": "node-03", "device": "cuda:3", "gpu": f"GPU-{UUID}",
}  # fmt: skip


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def lines(path):
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path):
    made = EventLog(str(tmp_path / "new" / "folder"), "run-1", WHO, clock=lambda: 1700000000.1234)
    yield made
    made.close()


@pytest.fixture
def written(log, tmp_path):
    """Writes events, and returns what the file holds."""

    def write(*events, step=31):
        for event in events:
            log.write(step, event)
        return lines(tmp_path / "new" / "folder" / "events.jsonl")

    return write


def test_events_tell_the_story_and_are_json(written):
    suspected = NONE
    for verdict in map(blamed, range(3)):
        events = written(*verdict_events(verdict, True, suspected, WHO), step=verdict.step)
        suspected = verdict.suspects
    first, *rest = [[event["kind"] for event in events if event["step"] == step] for step in (30, 31, 32)]
    assert first == ["step", "alarm", "excluded", "suspicion"]
    assert rest == [["step", "alarm", "excluded"], ["step", "alarm", "excluded", "conviction"]]
    assert events[1]["stage"] == 1 and events[1]["replica"] == 2 and events[1]["statistic"] == "energy"
    assert np.argmax(np.max(events[0]["scores"], axis=0)) == 2
    told = events[-1]
    assert (told["stage"], told["replica"], told["step"], told["proved"]) == (1, 2, 32, False)
    assert "stage 1, replica 2 (rank 5, node-03, cuda:3, GPU-1a2b3c4d) sent" in told["why"]


def test_every_line_says_of_which_run_and_schema_it_is_and_who_is_named(written):
    for event in written(*verdict_events(blamed(), False, NONE, WHO)):
        assert (event["schema_version"], event["run_id"], event["time"]) == (1, "run-1", 1700000000.123)
        assert event["who"] == ([PLACE] if event["kind"] in ("alarm", "suspicion") else [])


def test_all_who_are_named_anywhere_in_an_event_are_told_where_they_run(written):
    dispute = Dispute(FORWARD, 1, 0, Worker(1, 2), Worker(3, 0), Worker(2, 1), (0,))
    shown = replace(blamed(), findings=(), disputed=(dispute,), twins=True, excluded=np.zeros(3, bool))
    told = written(*verdict_events(shown, False, shown.suspects, WHO))
    assert [event["kind"] for event in told] == ["dispute", "twins"]
    assert told[0]["sender"] == [1, 2] and told[0]["at_fault"] is None
    assert [(one["rank"], one["host"]) for one in told[0]["who"]] == [(5, "node-03"), (9, "node-3"), (7, "node-2")]
    assert told[1]["suspects"] == [[1, 2]] and told[1]["who"] == [PLACE]


def test_a_start_lists_the_whole_mesh(written):
    (start,) = written(Start({"stages": 4, "replicas": 3}, {"enabled": True}, False))
    assert [one["rank"] for one in start["who"]] == list(range(12))


def test_numbers_that_json_does_not_know_are_null(written):
    values = {"value": np.nan, "residual": -np.inf, "low": float("nan"), "high": np.float64(np.inf), "score": 2.0}
    rest = {"trusted": False, "overflow": False, "cause": "fences", "strikes": True, "audit": None}
    alarm = Alarm(1, 2, direction="forward", link=1, micro_batches=[0], statistic="energy", **values, **rest)
    (event,) = written(alarm)
    assert [event[name] for name in values] == [None, None, None, None, 2.0]
    assert strict_json({"a": [(float("inf"), 1), {"b": float("nan")}]}) == '{"a": [[null, 1], {"b": null}]}'


def test_alarms_only():
    kinds = [event.kind for event in verdict_events(blamed(), False, NONE, WHO)]
    assert kinds == ["alarm", "excluded", "suspicion"]


def test_a_proof_is_told_before_the_conviction_that_follows_from_it():
    proof = Proof(CULPRIT, 2, FORWARD, (0,), 2, 3, trusted=False)
    verdict = replace(blamed(), twins=True, proofs=(proof,), newly_convicted=(CULPRIT,))
    *_, shown, convicted = verdict_events(verdict, False, NONE, WHO)
    assert shown.kind == "proof" and convicted.kind == "conviction" and convicted.proved


def test_who_is_isolated_is_told_when_that_changes():
    isolated = NONE.copy()
    isolated[CULPRIT] = isolated[2, 0] = True
    verdict = replace(blamed(), isolated=isolated, findings=(), excluded=np.zeros(3, bool), suspects=NONE)
    (told,) = verdict_events(verdict, False, NONE, WHO)
    assert told.kind == "isolated" and told.workers == (CULPRIT, Worker(2, 0)) == told.named()
    assert not [*verdict_events(verdict, False, NONE, WHO, isolated)]
    (told,) = verdict_events(replace(verdict, isolated=NONE), False, NONE, WHO, isolated)
    assert told.kind == "isolated" and told.workers == ()


def test_a_conviction_is_also_a_record_for_health_agents(log, tmp_path):
    log.write(31, Conviction(1, 2, "it was proved", proved=True))
    log.write(40, Conviction(2, 0, "three strikes", proved=False))
    on_gpu, on_cpu = lines(tmp_path / "new" / "folder" / "health.jsonl")
    assert on_gpu == {
        "version": 1,
        "agent": "deepspeed-sentinel",
        "componentClass": "GPU",
        "checkName": "SentinelConviction",
        "isFatal": True,
        "isHealthy": False,
        "message": "stage 1, replica 2 (rank 5, node-03, cuda:3, GPU-1a2b3c4d) convicted in step 31: it was proved",
        "recommendedAction": "RUN_DCGMEUD",
        "errorCode": ["SENTINEL_PROVED"],
        "entitiesImpacted": [
            {"entityType": "GPU_UUID", "entityValue": f"GPU-{UUID}"},
            {"entityType": "PCI", "entityValue": "0000:1b:00"},
        ],
        "metadata": {
            "run_id": "run-1",
            "step": "31",
            "stage": "1",
            "replica": "2",
            "rank": "5",
            "proved": "true",
            "injected": "false",
        },
        "generatedTimestamp": "2023-11-14T22:13:20.123Z",
        "nodeName": "node-03",
    }
    assert on_cpu["componentClass"] == "CPU" and on_cpu["entitiesImpacted"] == []
    assert (on_cpu["isFatal"], on_cpu["errorCode"], on_cpu["nodeName"]) == (False, ["SENTINEL_STRIKES"], "node-2")


def test_a_record_of_a_drill_cordons_no_node(log, tmp_path):
    log.write(0, Start({"stages": 4, "replicas": 3}, {}, True))
    log.write(31, Conviction(1, 2, "it was proved", proved=True))
    (told,) = lines(tmp_path / "new" / "folder" / "health.jsonl")
    assert (told["isFatal"], told["recommendedAction"]) == (False, "NONE")
    assert told["metadata"]["injected"] == told["metadata"]["proved"] == "true"
    assert told["message"].startswith("DRILL, faults were injected on purpose: stage 1, replica 2")


def test_only_convictions_are_told_to_health_agents(log, tmp_path):
    for event in verdict_events(blamed(), True, NONE, WHO):
        log.write(30, event)
    assert not (tmp_path / "new" / "folder" / "health.jsonl").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        EventLog(str(tmp_path / "file" / "below"), "run-1", WHO)


def test_replicas_that_differ_are_told_one_by_one(written):
    found = divisions(np.array([[1, 1, 2], [3, 4, 5]]))
    unequal = Comparison(9, (Worker(0, 2),), healed=True)
    undecided = Comparison(9, (), healed=False, undecided=(1,))
    told = written(*weights_events(unequal, found[:1], "healed"), *weights_events(undecided, found[1:], "stopped"))
    assert [(one["stage"], one["replica"], one["action"], one["groups"]) for one in told] == [
        (0, 2, "healed", None),
        (1, None, "stopped", [[0], [1], [2]]),
    ]
    assert [[(one["stage"], one["replica"]) for one in event["who"]] for event in told] == [
        [(0, 2)],
        [(1, 0), (1, 1), (1, 2)],
    ]


@pytest.mark.parametrize("why", ["proof", "rate"])
def test_a_device_is_told_with_its_counts(why, written):
    one = Standing("gpu:a", "node slot 0", (Worker(1, 2),), 9, 72, 4, 8, 0, 1, 0, 10, 20, 20)
    (event,) = written(device_event(one if why == "proof" else Above(one, 0.1, 1e-9)))
    rate = {"peers": 0.1, "chance": 1e-9} if why == "rate" else {"peers": None, "chance": None}
    assert event == {**event, "kind": "device", "why": why, "device": "gpu:a", "workers": [[1, 2]], "proofs": 1, **rate}
    assert event["who"] == [PLACE]


def test_who_moves_is_told_with_the_column_before_and_the_one_now(written):
    before, wiring = np.tile(np.arange(3), (4, 1)), np.tile(np.arange(3), (4, 1))
    wiring[1] = [2, 1, 0]
    wiring[2] = [1, 2, 0]
    (event,) = written(wiring_event(before, wiring))
    assert event["moved"] == [[1, 0, 0, 2], [1, 2, 2, 0], [2, 0, 0, 2], [2, 1, 1, 0], [2, 2, 2, 1]]
    assert [(one["stage"], one["replica"]) for one in event["who"]] == [(1, 0), (1, 2), (2, 0), (2, 1), (2, 2)]


# ---- docs/events.md ----

DOCS = Path(__file__).parents[2] / "docs" / "events.md"


def documented(kind):
    """A kind of events as docs/events.md has it: from the class, so that the two cannot differ."""
    event = EVENTS[kind]
    summary, _, rest = event.__doc__.partition("\n\n    Attributes:\n")
    told = []
    for line in rest.splitlines():
        if line.startswith(" " * 12):
            told[-1] += " " + line.strip()
        elif line.strip():
            told.append(line.strip())
    types = {field.name: str(field.type) for field in fields(event)}
    rows, seen = [], []
    for names, _, text in (one.partition(": ") for one in told):
        seen += names.split(", ")
        shown = ", ".join(f"`{name}`" for name in names.split(", "))
        kinds = ", ".join(dict.fromkeys(in_json(types[name]) for name in names.split(", ")))
        rows.append(f"| {shown} | {kinds} | {text.rstrip('.').replace('``', '`')} |")
    assert seen == list(types), f"the docstring of {event.__name__} names other fields than it has"
    table = ["", "| field | type | meaning |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"### {kind}", "", summary.replace("\n    ", "\n"), *table])


def in_json(annotation):
    """A type as the file has it."""
    nullable = annotation.endswith(" | None")
    base = annotation.removesuffix(" | None")
    names = {
        "bool": "boolean", "int": "whole number", "float": "number or null", "str": "text",
        "Worker": "[stage, replica]",
        "tuple[Worker, ...]": "list of [stage, replica]", "list[int]": "list of whole numbers",
        "list[list[int]]": "list of lists of whole numbers", "list[list[float]]": "list of lists of numbers",
        "dict[str, int]": "object of whole numbers", "dict[str, Any]": "object",
    }  # fmt: skip
    shown = "text" if base.startswith("Literal") else names[base]
    return f"{shown} or null" if nullable and "null" not in shown else shown


@pytest.mark.parametrize("kind", EVENTS)
def test_the_docs_say_what_a_kind_holds(kind):
    assert documented(kind) + "\n" in DOCS.read_text(encoding="utf-8"), (
        f"docs/events.md should have:\n{documented(kind)}"
    )


def test_the_docs_know_no_other_kind():
    headings = [line.removeprefix("### ") for line in DOCS.read_text().splitlines() if line.startswith("### ")]
    assert headings == list(EVENTS)


def test_every_class_of_events_is_a_kind():
    assert {kind: event.kind for kind, event in EVENTS.items()} == {kind: kind for kind in EVENTS}
    assert all(issubclass(event, Event) for event in EVENTS.values()) and len(EVENTS) == 25
