"""What the log is told, step by step, and what of convicted workers."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from deepspeed.utils import logger

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import CULPRIT, blamed

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine.requests import Decision
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.judgement.trial import Proof
from deepspeed_sentinel.judgement.verdict import Dispute
from deepspeed_sentinel.mesh import FORWARD, Mesh, Worker
from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.exclusion import Convict
from deepspeed_sentinel.telemetry.who import Who, place_of

MESH = Mesh(4, 3)
UUID = "1a2b3c4d-64d7-4f0a-a1c9-b2570c9d8e44"
NAME = "stage 1, replica 2 (rank 5, node-03, cuda:2, GPU-1a2b3c4d)"
PROOF = Proof(CULPRIT, 2, FORWARD, (0,), 2, 3, trusted=False)
DEVICES = [[Device(f"node-{stage}", slot, name="cpu") for slot in range(3)] for stage in range(4)]
DEVICES[1][2] = Device("node-03", 2, UUID, "", "cuda:2")
WHO = Who(np.arange(12).reshape(4, 3), DEVICES)


def begun(folder, **block):
    config = SentinelConfig.parse({"enabled": True, "output_dir": str(folder), **block}).of_mesh(MESH)
    return Telling(config, MESH, SimpleNamespace(of_first=lambda text: text), WHO)


def telling_of(folder, **block):
    """Of a run in which judging has begun."""
    telling = begun(folder, **block)
    telling.verdict(quiet())
    return telling


@pytest.fixture
def telling(tmp_path, one_rank):
    return telling_of(tmp_path)


@pytest.fixture
def log(caplog):
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


def words(log):
    """The word in capitals that each line of a step begins with, or the line's first words."""
    lines = [record.getMessage().removeprefix("[sentinel] ").partition(": ")[2] for record in log.records]
    return [line.split(":")[0] if line.split(":")[0].isupper() else " ".join(line.split()[:2]) for line in lines]


def marked(*workers):
    mask = np.zeros((4, 3), bool)
    for worker in workers:
        mask[worker] = True
    return mask


def attacked(convicted, newly=(), **more):
    """A step in which one worker is blamed and proved."""
    return replace(
        blamed(), convicted=marked(*convicted), newly_convicted=tuple(newly), proofs=(PROOF,), twins=True, **more
    )


def quiet(convicted=()):
    empty = {"findings": (), "disputed": (), "suspects": marked(), "excluded": np.zeros(3, bool)}
    return replace(blamed(), convicted=marked(*convicted), **empty)


def test_a_story_is_told_in_the_order_in_which_it_happens(telling, log):
    assert blamed().suspects[CULPRIT] and blamed().excluded.tolist() == [False, False, True]
    telling.verdict(attacked([CULPRIT], newly=[CULPRIT]))
    assert words(log) == ["ALARM", "LEFT OUT", "SUSPECT", "PROVED", "CONVICTED", "NOW"]
    assert all(record.getMessage().startswith(f"[sentinel] step {blamed().step}: ") for record in log.records)
    levels = [record.levelno for record in log.records]
    assert levels == [logging.WARNING] * 4 + [logging.ERROR] * 2, "DeepSpeed hides what is less than a warning"


def test_every_line_names_rank_host_and_device(telling, log):
    telling.verdict(attacked([CULPRIT], newly=[CULPRIT]))
    alarm, _, suspect, proof, conviction, _ = log.messages
    assert all(NAME in line for line in (alarm, suspect, proof, conviction))
    assert "worker (stage" not in log.text


def test_a_conviction_points_to_its_evidence_and_says_what_to_do_now(telling, log, tmp_path):
    telling.verdict(attacked([CULPRIT], newly=[CULPRIT]))
    proof, conviction, now = log.messages[-3:]
    assert f"PROVED: given the same micro-batches, {NAME}" in proof and "2 of 3 workers of its" in proof
    assert conviction.endswith(f"CONVICTED: {NAME}, PROVED above"), "it stands right above"
    assert "training goes on without it. Take node-03, slot 2 out of service" in now
    assert f"and test GPU-{UUID}; {tmp_path}/exclude.json says how" in now


def test_a_conviction_without_a_line_of_its_own_in_that_step_says_why(telling, log):
    telling.verdict(replace(blamed(), convicted=marked(CULPRIT), newly_convicted=(CULPRIT,)))
    assert any(line.endswith(f"CONVICTED: {NAME}, by strikes: the last is the ALARM above") for line in log.messages)
    log.clear()
    telling.verdict(replace(quiet([CULPRIT]), newly_convicted=(CULPRIT,)))
    assert f"CONVICTED: {NAME}. its weights, a reduction or a step computed twice were others than" in log.text


@pytest.mark.parametrize(
    ("action", "said"), [("observe", "Nothing is done"), ("halt", "NOW: Training stops"), ("exclude", "of no other")]
)
def test_what_follows_a_conviction_is_what_the_action_says(tmp_path, one_rank, log, action, said):
    telling_of(tmp_path, action=action).verdict(attacked([CULPRIT], newly=[CULPRIT]))
    assert said in log.records[-1].getMessage()


def test_whom_statistics_alone_convict_where_nothing_is_left_out_is_to_be_looked_into(tmp_path, one_rank, log):
    telling = telling_of(tmp_path, action="observe")
    telling.verdict(replace(blamed(), convicted=marked(CULPRIT), newly_convicted=(CULPRIT,)))
    assert "Look into node-03, slot 2: statistics alone" in log.messages[-1] and "Take" not in log.messages[-1]
    telling.verdict(attacked([CULPRIT], newly=[CULPRIT]))
    assert "Take node-03, slot 2 out of service" in log.messages[-1]


def test_a_drill_sends_nobody_to_a_machine(tmp_path, one_rank, log):
    fault = {"stage": 1, "replica": 2, "attack": "constant", "start_step": 0}
    telling_of(tmp_path, inject=[fault]).verdict(attacked([CULPRIT], newly=[CULPRIT]))
    assert "Faults are injected, so node-03, slot 2 has nothing to answer for" in log.messages[-1]


def test_a_column_that_stays_out_is_told_when_that_changes(telling, log):
    for verdict in (blamed(), blamed(), quiet(), quiet()):
        telling.verdict(verdict)
    told = [line for line in log.messages if "LEFT OUT" in line or "count again" in line]
    step = blamed().step
    assert told == [
        f"[sentinel] step {step}: LEFT OUT of the weights: column 2 of 3",
        f"[sentinel] step {step}: all columns count again",
    ]


def test_a_suspect_is_told_once_and_what_will_become_of_it(telling, log, tmp_path, one_rank):
    for _ in range(3):
        telling.verdict(blamed())
    (told,) = [line for line in log.messages if "SUSPECT" in line]
    assert told.endswith("; the next twin step tries it, which comes soon")
    log.clear()
    telling_of(tmp_path, conviction="statistics").verdict(blamed())
    (told,) = [line for line in log.messages if "SUSPECT" in line]
    assert told.endswith("3 strikes within 20 steps convict")


def test_a_suspect_that_is_trusted_is_no_candidate(telling, log):
    telling.verdict(replace(quiet(), suspects=marked(Worker(0, 1))))
    (told,) = log.messages
    assert (
        "SUSPECT: stage 0, replica 1 (rank 1, node-0, cpu): " in told and "; first and last stage are trusted" in told
    )


OTHER = Worker(1, 0)


@pytest.mark.parametrize(
    ("verdict", "why"),
    [
        (blamed(), f"{NAME}: its forward messages over link 1 lie outside the fences (energy, score "),
        (
            replace(blamed(), findings=(replace(blamed().findings[0], cause="sums"),)),
            f"{NAME}: deviations of its forward messages over link 1 have added up (energy, score ",
        ),
        (
            replace(blamed(), findings=(replace(blamed().findings[0], cause="later alarms"),)),
            f"{NAME}: alarms behind it are traced back to its forward messages over link 1 (energy, score ",
        ),
        (
            replace(quiet(), suspects=marked(CULPRIT), twins=True, unsettled=((OTHER, CULPRIT),)),
            f"{NAME}: given the same micro-batches, it made something else than stage 1, replica 0 (rank 3",
        ),
        (
            replace(quiet(), suspects=marked(CULPRIT), unsettled=((CULPRIT, Worker(2, 0)),)),
            f"{NAME}: it reports other contents of messages over link 1 than stage 2, replica 0 (rank 6",
        ),
        (
            replace(quiet(), suspects=marked(CULPRIT), unsettled=((CULPRIT, Worker(3, 0)),)),
            f"{NAME}: it reports other numbers of what entered and left stage 2 than stage 3, replica 0 (rank 9",
        ),
        (replace(quiet(), suspects=marked(CULPRIT), released=(CULPRIT,)), f"{NAME}: its conviction ran out"),
        (replace(quiet(), suspects=marked(CULPRIT)), f"{NAME}: it was one in the state that was taken over"),
    ],
)
def test_whatever_makes_a_suspect_its_line_says_why(telling, log, tmp_path, verdict, why):
    telling.verdict(verdict)
    (told,) = [line for line in log.messages if "SUSPECT" in line]
    assert f"SUSPECT: {why}" in told and told.endswith("; the next twin step tries it, which comes soon")
    events = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    (event,) = [event for event in events if event["kind"] == "suspicion"]
    assert event["why"] in told and event["why"]


def test_what_a_convicted_worker_goes_on_doing_is_told_once_then_counted(telling, log, tmp_path):
    first = attacked([CULPRIT], newly=[CULPRIT])
    assert first.findings and all(finding.worker == CULPRIT for finding in first.findings)
    telling.verdict(first)
    log.clear()
    for _ in range(3):
        telling.verdict(attacked([CULPRIT]))
    (line,) = log.messages
    assert f"{NAME} goes on after its conviction; from here on that is counted" in line
    number = 3 * (len(first.findings) + 1)
    names = ("judged_messages", "alarms", "disputes", "excluded_column_steps", "skipped_steps")
    telling.end(34, dict.fromkeys(names, 7), [CULPRIT])
    assert f"{NAME}: {number} alarms, disputes and proofs in 3 steps since it was convicted" in log.messages[1]
    assert "7 messages in alarm, 7 disputes, 7 column-steps left out, 7 steps skipped. " in log.messages[2]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "proof" for event in events) == 4, "events have them all"
    assert events[-1]["kind"] == "end" and events[-1]["since_conviction"] == [[1, 2, number]]


def test_a_run_ends_with_a_summary(telling, log, tmp_path):
    counts = {"judged_messages": 480, "alarms": 2, "disputes": 1, "excluded_column_steps": 3, "skipped_steps": 0}
    begun(tmp_path / "none").end(0, counts, [])
    assert not log.messages, "nothing was judged"
    for _ in range(3):
        telling.verdict(quiet())
    telling.end(4, counts, [])
    telling.end(4, counts, [CULPRIT])
    nobody, somebody = log.messages
    assert nobody.startswith(
        "[sentinel] END at step 4: 4 steps and 480 messages judged, 2 messages in alarm, 1 dispute, "
        f"3 column-steps left out, 0 steps skipped. Convicted: nobody. Events: {tmp_path}/events.jsonl"
    )
    assert f"Convicted: {NAME}; how to start again: {tmp_path}/exclude.json" in somebody
    end = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()][-1]
    assert end["counts"] == {"steps": 4, **counts} and end["convicted"] == [[1, 2]] and end["who"][0]["rank"] == 5


def test_of_others_everything_is_told(telling, log):
    for _ in range(2):
        telling.verdict(attacked([Worker(2, 0)]))
    assert sum("ALARM" in line for line in log.messages) == 2 * len(blamed().findings)
    assert "after its conviction" not in log.text


def test_a_dispute_of_a_convicted_worker_counts_as_its(telling, log):
    dispute = Dispute(FORWARD, 1, 2, CULPRIT, Worker(2, 2), None, (0,))
    telling.verdict(replace(quiet(), disputed=(dispute,)))
    assert words(log) == ["DISPUTE"]
    log.clear()
    telling.verdict(replace(quiet([CULPRIT]), disputed=(dispute,)))
    assert words(log) == ["stage 1,"] and "goes on after its conviction" in log.text


def test_who_is_isolated_is_told_by_name_when_that_changes(telling, log, tmp_path):
    one, both = marked(CULPRIT), marked(CULPRIT, Worker(2, 0))
    for isolated in (one, one, both, both, marked(), marked()):
        telling.verdict(replace(quiet(), isolated=isolated))
    first, second, third = [line.partition(": ")[2] for line in log.messages]
    assert first.startswith(f"ISOLATED: {NAME}. ") and "convicts nobody" in first
    assert second.startswith(f"ISOLATED: {NAME}; stage 2, replica 0 (rank 6, node-2, cpu). ")
    assert third == "nobody is isolated any more"
    events = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    told = [
        (event["workers"], [one["rank"] for one in event["who"]]) for event in events if event["kind"] == "isolated"
    ]
    assert told == [([[1, 2]], [5]), ([[1, 2], [2, 0]], [5, 6]), ([], [])]


def test_who_rounds_otherwise_is_told_of_once_and_in_the_event_of_each_such_step(telling, log, tmp_path):
    for _ in range(2):
        telling.verdict(replace(quiet(), twins=True, inexact=(CULPRIT,)))
    (line,) = log.messages
    assert NAME in line and "made other bits of the same than most of its stage" in line
    events = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert [event["inexact"] for event in events if event["kind"] == "twins"] == [[[1, 2]], [[1, 2]]]


def test_a_halt_is_a_line_before_anything_is_written_for_it(telling, log):
    telling.verdict(replace(attacked([CULPRIT], newly=[CULPRIT]), halt=f"{CULPRIT} convicted"))
    assert log.messages[-1] == f"[sentinel] step {blamed().step}: HALT: {NAME} convicted"
    assert log.records[-1].levelno == logging.CRITICAL


def test_a_conviction_that_does_not_hold_for_the_machine_that_is_there_now_names_both(telling, log, tmp_path):
    before = Device("node-77", 3, UUID, "", "cuda:3")
    telling.replaced(40, Convict(place_of(CULPRIT, 9, before), before, 31, "PROVED"))
    (line,) = log.messages
    then = "stage 1, replica 2 (rank 9, node-77, cuda:3, GPU-1a2b3c4d)"
    assert f"step 40: {then}, convicted in step 31 of a run before, is not here: {NAME} is in its place" in line
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["kind"], event["stage"], event["replica"], event["before"]) == ("replaced", 1, 2, then)
    assert event["who"][0]["host"] == "node-03"


def test_a_change_of_the_action_is_a_line_and_an_event_and_what_now_follows_from_it(telling, log, tmp_path):
    others = ((Worker(3, 1), "halt"),)
    telling.decided(9, Decision("observe", Worker(0, 0), True, others, ()))
    (line,) = [record.getMessage() for record in log.records]
    assert line == (
        "[sentinel] step 9: SETTINGS: action 'observe' in place of 'quarantine' from the next step on, as stage 0, "
        "replica 0 (rank 0, node-0, cpu) asked in control.json; stage 3, replica 1 (rank 10, node-3, cpu) asked for "
        "'halt', and the lowest rank decides"
    )
    telling.go_by(SentinelConfig.parse({"enabled": True}).with_action("observe", MESH))
    telling.decided(10, Decision("observe", Worker(0, 0), False, (), ()))
    assert len(log.records) == 1, "it is that already"
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    told = {"kind": "settings", "step": 9, "action": "observe", "before": "quarantine", "asked_by": [0, 0]}
    assert event == {**event, **told, "source": "file"} and [one["rank"] for one in event["who"]] == [0]
    telling.verdict(replace(attacked([CULPRIT], newly=[CULPRIT]), step=11))
    assert 'NOW: Nothing is done about it ("action": "observe")' in log.records[-1].getMessage()


def test_a_request_that_does_not_count_is_told_of_once(telling, log):
    for step in (9, 10):
        telling.decided(step, Decision(None, None, False, (), ((CULPRIT, "observe"),)))
    (line,) = [record.getMessage() for record in log.records]
    assert f"step 9: {NAME} asks for action 'observe', and that counts for nothing" in line
