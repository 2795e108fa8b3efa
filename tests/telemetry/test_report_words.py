"""What people read of workers and in the time line: nothing is cut without a word, no count is of something else."""

import json
import re

import pytest

pytest.importorskip("jinja2")

from deepspeed_sentinel.__main__ import main
from deepspeed_sentinel.telemetry.report import table
from deepspeed_sentinel.telemetry.report.digest import digest
from deepspeed_sentinel.telemetry.report.reading import read_run

START = {"kind": "start", "step": 0, "mesh": {"stages": 4, "replicas": 3}, "config": {}, "injecting": False}
PROOF = {"kind": "proof", "stage": 1, "replica": 2, "column": 2, "of": "forward", "micro_batches": [0], "agreeing": 2,
         "compared": 3, "trusted": False}  # fmt: skip
ALARM = {
    "kind": "alarm", "stage": 1, "replica": 2, "direction": "forward", "link": 1, "micro_batches": [0, 1],
    "statistic": "energy", "value": 1.0, "residual": 9.0, "low": -1.0, "high": 1.0, "score": 9.0, "trusted": False,
    "overflow": False, "cause": "fences", "strikes": True, "audit": None,
}  # fmt: skip
DISPUTE = {
    "kind": "dispute", "link": 1, "direction": "forward", "column": 0, "sender": [1, 0], "receiver": [2, 0],
    "about": None, "micro_batches": [0], "audit": None, "at_fault": None,
}  # fmt: skip


@pytest.fixture
def said(tmp_path, capsys, monkeypatch):
    """Writes events; gives the document, and what the page, the table and the table without rich say."""
    monkeypatch.setenv("COLUMNS", "200")

    def write(*events, **files):
        events = events if "mesh" in [*events, {}][0] else (START, *events)
        lines = [{"schema_version": 1, "run_id": "a", "time": 17e8, "who": [], **event} for event in events]
        (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert main(["report", str(tmp_path), "--html", str(tmp_path / "a.html")]) == 0
        with_rich = capsys.readouterr().out
        with monkeypatch.context() as here:
            here.setattr(table.importlib.util, "find_spec", lambda name: None)
            assert main(["report", str(tmp_path)]) == 0
        shown = [(tmp_path / "a.html").read_text(), with_rich, capsys.readouterr().out]
        return digest(read_run(tmp_path)), [re.sub(r"[\s│]+", " ", re.sub("<[^>]*>", " ", one)) for one in shown]

    return write


def told(document, kind):
    return [entry["text"] for entry in document["timeline"] if entry["kind"] == kind]


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        ([35, 36, 37, 40, 52, 60, 71], "and 4 more in steps 40 to 71"),
        ([35, 36, 37, 40], "and 1 more in step 40"),
        ([35, 36, 37], None),
    ],
)
def test_proofs_that_are_not_shown_are_counted(said, steps, more):
    document, everywhere = said(*({**PROOF, "step": step, "micro_batches": [step]} for step in steps))
    assert [proof["step"] for proof in document["workers"][0]["proofs"]] == steps
    for text in everywhere:
        assert (
            "in step 37: given the same micro-batches, it made other forward messages (activations, micro-batches 37)"
            in text
        )
        assert (more in text) if more else not re.search(r"and \d+ more in", text)
        assert "step 52:" not in text


def test_the_same_proof_again_and_again_is_one_line(said):
    _, everywhere = said(*({**PROOF, "step": step} for step in (35, 36, 37, 40, 52, 60, 71)))
    assert all("proved in steps 35-37, 40, 52, 60, 71: given the same" in text for text in everywhere)
    assert not any("more in step" in text for text in everywhere)


def test_workers_and_disputes_that_are_not_shown_are_counted(said, monkeypatch):
    monkeypatch.setattr(table, "_MOST", 2)
    links = [{**DISPUTE, "step": 30, "sender": [1, one], "receiver": [2, one], "column": one} for one in range(3)]
    _, (_, *tables) = said(*links)
    for text in tables:
        assert "and 1 more: --html or --json has all" in text and "and 4 more: --html or --json has all" in text


def test_all_devices_with_trouble_are_in_the_document_and_those_not_shown_are_counted(said):
    one = {"total": {"proofs": 1, "steps": 1}, "places": []}
    document, (page, *_) = said(ledger={"devices": {f"cpu:node/{number}": one for number in range(60)}})
    assert len(document["devices"]) == 60 and "and 10 more: --json has all" in page


def test_each_statistic_is_counted_for_itself(said):
    alarms = [{**ALARM, "step": 30 + step, "statistic": "max_abs" if step > 1 else "energy"} for step in range(12)]
    back = {**ALARM, "step": 33, "direction": "backward", "link": 0}
    document, (page, *_) = said(*alarms, back)
    (text,) = told(document, "alarm")
    assert "forward over link 1, energy (mean square of all values), in 2 steps" in text
    assert "forward over link 1, max_abs (largest value, whichever sign), in 10 steps" in text
    assert text.endswith("backward over link 0, energy (mean square of all values), in step 33")
    assert "times)" not in page and "ALARM: stage 1, replica 2 sent messages outside the fences" in page


def test_an_alarm_by_what_has_added_up_is_not_said_to_be_outside_the_fences(said):
    document, _ = said(*({**ALARM, "step": 30 + step, "cause": cause} for step, cause in enumerate(("fences", "sums"))))
    first, second = told(document, "alarm")
    assert "outside the fences" in first and "outside the fences" not in second and "added up" in second


def test_proofs_and_disputes_of_different_things_are_not_one(said):
    proofs = [{**PROOF, "step": 30 + step, "of": of} for step, of in enumerate(("forward", "gradients", "gradients"))]
    disputes = [{**DISPUTE, "step": 30, "link": link} for link in (1, 0, 0)]
    document, _ = said(*proofs, *disputes)
    (proved,) = told(document, "proof")
    assert proved.endswith(": gradients of its weights, in 2 steps; forward messages, in step 30")
    assert len(told(document, "dispute")) == 2
    entries = [entry for entry in document["timeline"] if entry["kind"] == "dispute"]
    assert [entry["count"] for entry in entries] == [1, 1], "steps are counted, not columns"


def test_the_note_beside_the_line_for_slurm_is_shown(said):
    note = "SLURM leaves out whole hosts, not single GPUs: with vm also 10 slots that nothing is known against"
    document, everywhere = said(exclude={"slurm": "--exclude=vm", "slurm_note": note, "deepspeed": "--exclude=vm:5"})
    assert (document["todo"]["lines"][1]["note"], document["todo"]["lines"][1]["for"]) == (note, "SLURM")
    assert all(note in text for text in everywhere)
    document, everywhere = said(exclude={"slurm": "--exclude=vm", "slurm_note": 3})
    assert document["todo"]["lines"][0]["note"] == ""
    assert not any("nothing is known against" in text for text in everywhere), "where whole hosts are bad it is untrue"


@pytest.mark.parametrize("injecting", [True, False])
def test_the_headline_says_that_it_is_a_drill_and_that_training_was_stopped(said, injecting):
    conviction = {"kind": "conviction", "step": 32, "stage": 1, "replica": 2, "why": "it was", "proved": True}
    halt = {"kind": "halt", "step": 32, "reason": "asked for"}
    _, (page, *_) = said({**START, "injecting": injecting}, conviction, halt)
    drill = "Faults injected on purpose: 1 worker convicted: stage 1, replica 2. Training was stopped Sentinel watched"
    assert (drill if injecting else f" {drill.partition(': ')[2]}") in page
    assert ("Faults injected on purpose:" in page) == injecting


def test_why_a_cleared_worker_was_suspected_is_told(said):
    place = {"stage": 2, "replica": 2}
    why = "given the same micro-batches, stage 2, replica 2 made something else than stage 2, replica 0"
    document, everywhere = said(
        {"kind": "suspicion", "step": 36, **place, "why": why},
        {"kind": "cleared", "step": 40, **place},
        {"kind": "suspicion", "step": 50, "stage": 1, "replica": 1},
        {"kind": "cleared", "step": 51, "stage": 1, "replica": 1},
    )
    assert [one["state"] for one in document["workers"]] == ["cleared", "cleared"]
    assert told(document, "suspicion")[0] == f"SUSPECT: stage 2, replica 2: {why}"
    for text in everywhere:
        assert f"suspected in step 36: {why}" in text and "cleared in step 40" in text
        assert "suspected in step 50: why is not told" in text


def test_what_was_done_about_other_weights_is_said_in_words(said):
    found = {"kind": "weights", "step": 40, "stage": 1, "groups": None}
    undecided = {**found, "replica": None, "action": "stopped", "groups": [[0], [1]]}
    document, everywhere = said({**found, "replica": 2, "action": "healed"}, undecided)
    healed = "held other weights than most of its stage, and was given the majority's"
    assert all(f"also in step 40: it {healed}" in text.replace("&#39;", "'") for text in everywhere)
    assert told(document, "weights") == [
        f"WEIGHTS: stage 1, replica 2 {healed}",
        "WEIGHTS: replicas of stage 1 hold different ones, and no majority tells which are right",
    ]


def test_who_differed_from_whom_is_said_in_plain_words(said):
    document, everywhere = said(
        {"kind": "difference", "step": 36, "workers": [[2, 0]], "of": "forward", "as_received": False},
        {"kind": "difference", "step": 37, "workers": [[2, 0]], "of": "forward", "as_received": False},
        {"kind": "contradicted", "step": 37, "stage": 2, "replica": 0, "partners": [[2, 1], [2, 2]]},
    )
    seen = "given the same micro-batches, stage 2, replica 0 made something else than stage 2, replica 1 and stage 2"
    alone = "made other forward messages than others of its stage, and no majority tells who is wrong"
    for text in everywhere:
        assert seen in text and "so it is stage 2, replica 0" in text
        assert f"in steps 36-37: given the same micro-batches, it {alone}" in text
    (difference,) = told(document, "difference")
    assert difference.startswith(
        "DIFFERENT: given the same micro-batches, stage 2, replica 0 made other forward messages"
    )


@pytest.mark.parametrize(
    ("alarm", "clause"),
    [
        ({"score": 9.0}, ""),
        ({"score": 0.7826, "cause": "later alarms"}, "; inside the fence, but alarms behind it are traced back to it"),
        ({"score": 0.4, "cause": "sums"}, "; an alarm by deviations that have added up"),
        ({"score": 9.0, "overflow": True}, "; loss scaling may explain it"),
    ],
)
def test_why_an_alarm_is_one_stands_beside_its_score_everywhere(said, alarm, clause):
    _, shown = said({**ALARM, "step": 30, **alarm})
    score = f"score {alarm['score']:.4g}"
    page, *terminals = shown
    assert f"{score} {clause}" in page
    for terminal in terminals:
        assert f"{score} (1 is on the fence){clause}" in terminal
        assert clause or f"{score} (1 is on the fence);" not in terminal
