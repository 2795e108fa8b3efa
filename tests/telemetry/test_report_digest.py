"""What the report says of a run is what happened in it."""

import json
from base64 import b64decode

import numpy as np
import pytest

from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.exclusion import Convict, exclusions
from deepspeed_sentinel.telemetry.report.digest import _since, digest
from deepspeed_sentinel.telemetry.report.heat import FENCE, heat, level
from deepspeed_sentinel.telemetry.report.losses import find_loss, read_loss
from deepspeed_sentinel.telemetry.report.reading import read_run
from deepspeed_sentinel.telemetry.report.starting import lines_to_start
from deepspeed_sentinel.telemetry.report.words import spans
from deepspeed_sentinel.telemetry.who import Who


@pytest.fixture
def document(recorded):
    return digest(read_run(recorded()))


def test_three_sentences_say_what_happened(document):
    first, second, third = document["sentences"]
    assert "4 stages x 3 replicas in steps 0 to 33" in first and "1,200 messages" in first
    assert "Stage 1, replica 2 (rank 5, node-03, cuda:3, GPU-1a2b3c4d) was in alarm from step 30 on" in second
    assert "convicted by statistics, not by proof, in step 32" in second
    assert "4 of 102 column-steps" in third and "training went on with 2 of 3 columns" in third
    assert document["state"] == "convicted"


def test_the_evidence_is_of_the_worst_alarm(recorded):
    folder = recorded()
    told = [event for event in map(json.loads, (folder / "events.jsonl").open()) if event["kind"] == "alarm"]
    (one,) = [one for one in digest(read_run(folder))["workers"] if one["state"] == "convicted"]
    worst = max(told, key=lambda event: event["score"])
    assert {name: worst[name] for name in one["worst"]} == one["worst"] and one["worst"]["statistic"] == "energy"
    assert one["alarm_steps"] == [30, 31, 32, 33] and one["alarms"] == sum(
        len(event["micro_batches"]) for event in told
    )
    assert (one["host"], one["device"], one["gpu"][:12]) == ("node-03", "cuda:3", "GPU-1a2b3c4d")


def test_what_goes_on_is_one_entry_of_the_time_line(document):
    (alarms,) = [entry for entry in document["timeline"] if entry["kind"] == "alarm"]
    assert (alarms["step"], alarms["last"], alarms["count"]) == (30, 33, 4)
    assert [entry["kind"] for entry in document["timeline"]] == [
        "start", "alarm", "excluded", "suspicion", "conviction", "wiring", "end",
    ]  # fmt: skip


def test_the_cost_and_who_served_which_column(document):
    cost = document["cost"]
    assert cost["by_column"] == [0, 0, 4] and cost["column_steps"] == 4 and cost["of"] == 102
    assert cost["steps_worth"] == pytest.approx(4 / 3) and cost["seconds"] > 0
    before, after = document["deals"]
    assert (before["step"], before["last"], after["step"], after["last"]) == (0, 32, 33, None)
    assert after["wiring"][1] == [2, 1, 0] and after["lost"] == [True, False, False]


def test_what_to_do_has_lines_to_paste(document):
    todo = document["todo"]
    assert todo["advice"][0].startswith("Take node-03, slot 3, out of service and test GPU-1a2b3c4d-64d7")
    assert [line["text"] for line in todo["lines"]] == [
        "deepspeed --hostfile=hosts.left --include=node-0:0,1,2@node-1:0,1@node-2:0,1,2 ...",
        "node-0 slots=3\nnode-1 slots=2\nnode-2 slots=3",
        "torchrun --nnodes=3 --nproc_per_node=3 ...",
        "torchrun --nnodes=3 --nproc_per_node=2 ...",
        "sbatch --exclude=node-03 ...",
    ]
    first, hostfile, *_, slurm = todo["lines"]
    assert "these slots alone" in first["for"] and "hosts.left" in hostfile["for"] and "whole hosts" in slurm["for"]
    assert first["note"].startswith("Start 8 processes (4 stages x 2 replicas). node-3 slots 0,1,2 stay idle")
    assert [line["for"] for line in todo["lines"][2:4]] == ["torchrun, on node-0, node-2", "torchrun, on node-1"]


def test_what_to_do_on_one_host_needs_no_hostfile():
    devices = [[Device("vm", 2 * stage + replica, name="cuda:0") for replica in range(2)] for stage in range(2)]
    where = Who(np.arange(4).reshape(2, 2), devices)(Worker(1, 0))
    told = exclusions([Convict(where, devices[1][0], 3, "it did", True)], devices, 5)
    notes: list[str] = []
    lines = lines_to_start(told, notes, True)["lines"]
    assert [line["text"] for line in lines] == [
        "deepspeed --include=localhost:0,1 ...",
        "CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node=2 ...",
        "sbatch --exclude=vm ...",
    ]
    assert "Start 2 processes" in lines[0]["note"] and not notes


def test_whom_statistics_convict_while_nothing_is_kept_out_is_looked_into(recorded):
    document = digest(read_run(recorded(action="observe")))
    (advice,) = document["todo"]["advice"]
    assert advice.startswith("Look into stage 1, replica 2 (rank 5, node-03") and "by statistics alone" in advice
    assert document["todo"]["lines"] == [] and document["todo"]["replicas_left"] is None
    assert any("in_lines false" in note for note in document["notes"])


def test_a_drill_asks_for_nothing(recorded):
    todo = digest(read_run(recorded(injecting=True)))["todo"]
    assert todo["advice"][0].startswith("Nothing: faults were injected on purpose") and "Take" in todo["advice"][1]
    assert "injected on purpose" in todo["lines"][0]["note"]


@pytest.mark.parametrize("host", ["a;rm -rf ~", "$(id)", "a b", "`id`", "a\nb", "x' || y"])
def test_no_line_to_paste_has_what_a_shell_acts_on(recorded, host):
    folder = recorded()
    path = folder / "exclude.json"
    said = {**json.loads(path.read_text()), "deepspeed": f"--include={host}:1", "slurm": f"--exclude={host}",
            "torchrun": {"a": f"torchrun --nproc_per_node=2 {host}"}}  # fmt: skip
    path.write_text(json.dumps({**said, "hostfile": [f"{host} slots=3"]}))
    document = digest(read_run(folder))
    assert document["todo"]["lines"] == [] and sum("a shell acts on" in note for note in document["notes"]) == 2


def test_another_machine_in_a_convicted_place_is_not_convicted(recorded):
    """``exclude.json`` is still that of the run before."""
    folder = recorded()
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    replaced = {**events[0], "kind": "replaced", "stage": 1, "replica": 2, "before": "stage 1, replica 2 (rank 5, old)"}
    run = [{**event, "run_id": "run-2"} for event in (events[0], replaced)]
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in run)
    document = digest(read_run(folder))
    assert document["state"] == "clean" and not document["workers"]
    (entry,) = [entry for entry in document["timeline"] if entry["kind"] == "replaced"]
    assert "stage 1, replica 2 (rank 5, old), convicted before, is not here" in entry["text"]


def test_who_is_isolated_is_in_the_time_line(recorded):
    folder = recorded()
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    head = {name: events[0][name] for name in ("schema_version", "run_id", "time")}
    told = [{**head, "kind": "isolated", "step": 33, "workers": workers} for workers in ([[1, 2], [2, 0]], [])]
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in told)
    first, last = [entry["text"] for entry in digest(read_run(folder))["timeline"] if entry["kind"] == "isolated"]
    assert first.startswith("ISOLATED, unproved: stage 1, replica 2 (rank 5, node-03") and "stage 2, replica 0" in first
    assert last == "nobody is isolated any more"


def test_nothing_found_is_said(recorded):
    folder = recorded()
    lines = (folder / "events.jsonl").read_text().splitlines()
    clean = [line for line in lines if json.loads(line)["kind"] in ("start", "step") and '"step": 3' not in line]
    (folder / "events.jsonl").write_text("\n".join(clean))
    (folder / "exclude.json").unlink()
    document = digest(read_run(folder))
    assert document["state"] == "clean" and document["workers"] == [] and document["todo"]["advice"] == []
    assert document["sentences"][1] == "Nothing was found: no alarm, no dispute, no conviction."
    assert "no end is told" in document["sentences"][2]


def test_without_scores_of_clean_steps_the_report_says_so(recorded):
    run = read_run(recorded(every_step=False))
    document = digest(run)
    assert any("clean steps were not recorded" in note for note in document["notes"])
    assert not document["run"]["every_step"]


def test_heat_levels_are_of_the_scores():
    levels = level(np.array([np.nan, 0.0, 1e-9, 0.1, 1.0, 10.0, 1e9]))
    assert levels.tolist() == [0, 0, 1, 64, FENCE, 192, 255]


def test_heat_puts_steps_together_and_keeps_the_worst(recorded):
    run = read_run(recorded())
    whole = heat(run, 0, 33)
    assert (whole["width"], whole["cells"]) == (1, 34)
    scores = np.frombuffer(b64decode(whole["levels"]), np.uint8).reshape(12, 34)
    assert scores[5, 30] > FENCE and (scores[:, :30] <= FENCE).mean() > 0.9
    assert ["conviction", 5, 32] in whole["marks"] and [5, 33, 0] in whole["moves"]
    far = heat(run, 0, 10_000_000)
    put = np.frombuffer(b64decode(far["levels"]), np.uint8).reshape(12, -1)
    assert far["width"] > 1 and put.shape[1] == far["cells"] and put[5, 0] == scores[5].max()
    assert put.size <= 1 << 21


def test_spans():
    assert spans([3, 4, 5, 9]) == "3-5, 9" and spans([]) == "" and spans([1, 1, 2]) == "1-2"
    assert spans(list(range(0, 100, 2))).endswith("and 38 more spans")


def test_loss_of_the_trainer_is_found_and_counts_finished_steps(tmp_path):
    folder = tmp_path / "out" / "logs"
    (tmp_path / "out" / "checkpoint-9").mkdir(parents=True)
    folder.mkdir()
    assert find_loss(folder) is None
    state = {"log_history": [{"step": 1, "loss": 4.0}, {"step": 2, "eval_runtime": 1}, {"step": 3, "loss": None}]}
    (tmp_path / "out" / "checkpoint-9" / "trainer_state.json").write_text(json.dumps(state))
    assert read_loss(find_loss(folder)) == {"": [[0, 4.0]]}


@pytest.mark.parametrize(
    ("name", "text", "samples", "read"),
    [
        ("a.csv", "step,loss\n0,4.5\n1,nan\n2,3.5\n", 1, [[0, 4.5], [2, 3.5]]),
        ("b.jsonl", '{"step": 1, "train_loss": 2}\n{"step"', 1, [[1, 2.0]]),
        ("Train_Samples_train_loss.csv", "step,train_loss\n32,4.5\n64,4.0\n", 32, [[0, 4.5], [1, 4.0]]),
    ],
)
def test_loss_tables(tmp_path, name, text, samples, read):
    (tmp_path / name).write_text(text)
    assert read_loss(tmp_path / name, samples) == {"": read}


def test_the_losses_of_several_runs_in_one_file_are_kept_apart(tmp_path):
    """As the demo writes them, one run after the other."""
    path = tmp_path / "progress.jsonl"
    lines = [
        {"kind": kind, "run": run, "step": step, "loss": loss}
        for run, loss in (("clean", 4.0), ("attacked", 9.0), ("guarded", 5.0))
        for kind, step in (("run_start", None), ("step", 0), ("step", 1))
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_loss(path) == {
        "clean": [[0, 4.0], [1, 4.0]], "attacked": [[0, 9.0], [1, 9.0]], "guarded": [[0, 5.0], [1, 5.0]],
    }  # fmt: skip
    path.write_text("\n".join(json.dumps({"run": run, "step": 0, "loss": 1.0}) for run in range(9)))
    with pytest.raises(ValueError, match="9 runs"):
        read_loss(path)


def test_a_table_without_a_loss_says_what_to_give(tmp_path):
    (tmp_path / "a.csv").write_text("time,accuracy\n1,2\n")
    with pytest.raises(ValueError, match="columns step and loss"):
        read_loss(tmp_path / "a.csv")


def without(folder, *kinds, more=()):
    lines = (folder / "events.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] not in kinds]
    (folder / "events.jsonl").write_text("\n".join([*kept, *map(json.dumps, more)]))
    return digest(read_run(folder))


def test_who_was_convicted_before_this_run_is_convicted(recorded):
    folder = recorded()
    document = without(folder, "conviction")
    (one,) = [one for one in document["workers"] if one["state"] == "convicted"]
    assert one["convicted"]["step"] == 32 and "energy" in one["convicted"]["why"], "as exclude.json says"
    (folder / "exclude.json").unlink()
    document = digest(read_run(folder))
    (one,) = [one for one in document["workers"] if one["state"] == "convicted"]
    assert (
        one["convicted"]["step"] is None
        and "was in alarm from step 30 on and was convicted before" in (document["sentences"][1])
    )


def test_who_was_proved_and_not_convicted_is_not_passed_over(recorded):
    folder = recorded()
    (folder / "exclude.json").unlink()
    proof = {"kind": "proof", "step": 33, "run_id": "run-1", "stage": 0, "replica": 1, "column": 1, "of": "forward",
             "micro_batches": [0], "agreeing": 2, "compared": 3, "trusted": True}  # fmt: skip
    document = without(folder, "alarm", "suspicion", "conviction", "end", more=[proof])
    assert document["state"] == "proved" and document["workers"][0]["state"] == "proved"
    assert "as first and last stage never are" in document["todo"]["advice"][0]
    assert "was proved to compute something else" in document["sentences"][1]


def test_machines_that_earlier_runs_found_are_kept_out(recorded):
    folder = recorded()
    said = json.loads((folder / "exclude.json").read_text())
    said["workers"].append({"host": "node-9", "slot": 4, "device": "cpu:node-9/4", "why": "it was", "earlier": True})
    (folder / "exclude.json").write_text(json.dumps(said))
    document = digest(read_run(folder))
    assert "Keep node-9, slot 4 out of service: convicted in an earlier run. it was" in document["todo"]["advice"]
    assert len([one for one in document["workers"] if one["state"] == "convicted"]) == 1


@pytest.mark.parametrize("workers", [3, [3], [{"stage": 99, "replica": 0}], [{"stage": [1]}], [{"earlier": 1}]])
def test_exclusions_that_are_none_convict_nobody_else(recorded, workers):
    folder = recorded()
    said = json.loads((folder / "exclude.json").read_text())
    (folder / "exclude.json").write_text(json.dumps({**said, "workers": workers}))
    assert [one["state"] for one in digest(read_run(folder))["workers"]].count("convicted") == 1


def test_a_conviction_without_exclusions_says_that_lines_are_missing(recorded):
    folder = recorded()
    (folder / "exclude.json").unlink()
    document = digest(read_run(folder))
    assert document["todo"]["lines"] == [] and any("exclude.json is not there" in note for note in document["notes"])
    assert document["todo"]["advice"][0].startswith("Take node-03, slot 3,")


@pytest.mark.parametrize(
    ("steps", "convicted", "said"),
    [
        ([30, 31, 33], 31, "in alarm from step 30 on and was "),
        ([20, 30, 33], 31, "in alarm from step 30 on (and in 1 earlier step) and was "),
        ([3, 9, 25, 28, 30], 30, "in alarm from step 25 on (and in 2 earlier steps) and was "),
        ([40, 41], 31, "in alarm from step 40 on and was "),
        ([7, 8], None, "in alarm from step 7 on and was "),
        ([], 31, ""),
    ],
)
def test_an_alarm_long_before_is_not_where_it_began(steps, convicted, said):
    assert _since({"alarm_steps": steps, "convicted": {"step": convicted}}) == said
