"""The file that says how to start without the convicted."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import World, blamed

from deepspeed_sentinel.engine.convictions import Convictions
from deepspeed_sentinel.judgement.trial import Proof
from deepspeed_sentinel.mesh import FORWARD, Worker
from deepspeed_sentinel.telemetry.devices import NOBODY, Device
from deepspeed_sentinel.telemetry.exclusion import read_saved, write_exclusions
from deepspeed_sentinel.telemetry.who import Who

CULPRIT = Worker(1, 0)
PROOF = Proof(CULPRIT, 0, FORWARD, (0,), 2, 3, trusted=False)
DEVICES = [[Device(f"node-{stage}", replica, name="cpu") for replica in range(2)] for stage in range(3)]


@pytest.fixture
def run(tmp_path, one_rank):
    """A run whose record can be set."""
    run = SimpleNamespace(convicted=np.zeros((3, 2), bool), step=7, file=tmp_path / "exclude.json")
    run.convictions = of(run, DEVICES)
    return run


def of(run, devices, **more):
    who = Who(np.arange(6).reshape(3, 2), devices)
    return Convictions(str(run.file.parent), who, lambda: run.convicted, step=lambda: run.step, **more)


def verdict(newly_convicted=(CULPRIT,), proofs=(PROOF,), findings=(), step=6):
    return replace(World().step(), step=step, newly_convicted=newly_convicted, proofs=proofs, findings=findings)


def convict(run, **more):
    run.convicted[CULPRIT] = True
    assert run.convictions.take(verdict(), **more)


def test_a_conviction_is_written_with_its_reason_and_taken_back_with_it(run):
    convict(run)
    assert run.convictions.write() == run.file
    (worker,) = json.loads(run.file.read_text())["workers"]
    assert (worker["rank"], worker["step"]) == (2, 6) and "stage 1, replica 0 (rank 2, node-1, cpu) sent" in worker[
        "why"
    ]
    assert str(run.convictions.convicts[0]) == "stage 1, replica 0 (rank 2, node-1, cpu)"
    run.convicted[CULPRIT] = False
    run.convictions.write()
    assert json.loads(run.file.read_text())["workers"] == [], "it was released"


def finding():
    return next(one for one in blamed().findings if one.worker == Worker(1, 2))


def test_whom_statistics_alone_convict_while_nothing_is_kept_out_no_line_leaves_out_until_it_is_proved(run):
    """The demo's run without a guard: the honest worker behind the fault is outside of the fences too."""
    run.convicted[CULPRIT] = True
    by_statistics = verdict(proofs=(), findings=(replace(finding(), worker=CULPRIT),))
    assert run.convictions.take(by_statistics, observed=True)
    written = json.loads(run.convictions.write().read_text())
    (worker,) = written["workers"]
    assert (worker["proved"], worker["in_lines"]) == (False, False)
    assert written["hosts"] == [] and written["deepspeed"] == written["slurm"] == ""

    resumed = of(run, DEVICES)
    resumed.load_state_dict(run.convictions.state_dict())
    assert resumed.convicts == run.convictions.convicts and not resumed.convicts[0].in_lines
    assert not resumed.take(verdict((), (), step=8), observed=True)
    assert resumed.take(verdict((), step=9), observed=True)
    assert (resumed.convicts[0].proved, resumed.convicts[0].step) == (True, 9)
    assert json.loads(resumed.write().read_text())["hosts"] == ["node-1"]
    assert not resumed.take(verdict((), step=10), observed=True), "it is known"


def test_a_state_from_before_this_was_told_is_taken_over():
    (one,) = read_saved(
        [{"worker": [1, 0], "rank": 2, "device": {"host": "a", "slot": 0}, "step": 1, "why": ""}]
    ).values()
    assert one.proved is None and one.in_lines


def test_the_file_of_a_drill_says_so(run):
    run.convictions = of(run, DEVICES, injected=True)
    convict(run)
    written = json.loads(run.convictions.write().read_text())
    assert written["injected"] and written["workers"][0]["injected"]
    resumed = of(run, DEVICES)
    resumed.load_state_dict(run.convictions.state_dict())
    told = json.loads(resumed.write().read_text())
    assert [(one["injected"], one["in_lines"]) for one in told["workers"]] == [(True, False)]
    assert told["hosts"] == [] and not told["injected"] and "Whom a drill convicted" in told["note"]
    run.convictions = of(run, DEVICES)
    convict(run)
    told = json.loads(run.convictions.write().read_text())
    assert [(one["injected"], one["in_lines"]) for one in told["workers"]] == [(False, True)]


def test_the_end_of_a_run_is_written_after_the_script_has_ended_its_process_group(run):
    convict(run)
    assert run.convictions.write() == run.file
    run.convicted[CULPRIT] = False
    torch.distributed.destroy_process_group()
    run.convictions.write()
    assert json.loads(run.file.read_text())["workers"] == []


def test_what_an_earlier_run_left_stays_beside_what_this_one_adds(run, tmp_path):
    """Else the start after next would take back the machine that this run did without."""
    entry = {"stage": 2, "replica": 1, "rank": 5, "host": "node-3", "slot": 0, "device": "cpu:node-3/0", "why": "it"}
    write_exclusions(run.file, {"workers": [entry], "hosts": ["node-3"]})
    assert run.convictions.write() is None and json.loads(run.file.read_text())["hosts"] == ["node-3"]
    convict(run)
    run.convictions.write()
    run.convictions.write()
    written = json.loads(run.file.read_text())
    assert written["hosts"] == ["node-1", "node-3"] and written["slurm"] == "--exclude=node-1,node-3"
    assert [worker.get("earlier", False) for worker in written["workers"]] == [False, True]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"workers": 3}',
        '{"workers": [{"host": "two words", "slot": 0}]}',
        '{"workers": [{"host": "node-3", "slot": 0}]}',
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_and_left(run, text):
    run.file.write_text(text)
    convict(run)
    with pytest.raises(ValueError, match="none of ours"):
        run.convictions.write()
    assert run.file.read_text() == text


def test_a_run_that_goes_on_elsewhere_names_the_machine_of_then(run):
    convict(run)
    elsewhere = [[Device(f"other-{stage}", replica) for replica in range(2)] for stage in range(3)]
    resumed = of(run, elsewhere)
    resumed.load_state_dict(run.convictions.state_dict())
    assert resumed.convicts == run.convictions.convicts and resumed.convicts[0].device.host == "node-1"


def moved(worker, device):
    devices = [list(of_stage) for of_stage in DEVICES]
    devices[worker.stage][worker.replica] = device
    return devices


@pytest.mark.parametrize(
    ("then", "now", "another"),
    [
        (Device("node-1", 0), Device("node-1", 0), False),
        (Device("node-1", 0), Device("node-9", 0), True),
        (Device("node-1", 0), Device("node-1", 1), True),
        (Device("node-1", 0, "uuid-a"), Device("node-9", 3, "uuid-a"), False),
        (Device("node-1", 0, "uuid-a"), Device("node-1", 0, "uuid-b"), True),
        (Device("node-1", 0, pci="0:1b:0"), Device("node-1", 2, pci="0:1b:0"), False),
        (Device("node-1", 0, pci="0:1b:0"), Device("node-1", 0, pci="0:1c:0"), True),
        (Device("node-1", 0, pci="0:1b:0"), Device("node-2", 0, pci="0:1b:0"), True),
        (Device("node-1", 0, "uuid-a", "0:1b:0"), Device("node-1", 0, "", "0:1b:0"), False),
        (Device("node-1", 0, "uuid-a"), NOBODY, False),
        (NOBODY, Device("node-1", 0, "uuid-a"), False),
    ],
)
def test_a_conviction_of_a_run_before_does_not_hold_for_another_machine(run, then, now, another):
    """By the most lasting name that both give; who keeps its name back is not rid of a conviction by that."""
    run.convictions = of(run, moved(CULPRIT, then))
    convict(run)
    resumed = of(run, moved(CULPRIT, now))
    resumed.load_state_dict(run.convictions.state_dict())
    assert [one.worker for one in resumed.replaced] == [CULPRIT] * another
    run.convicted[CULPRIT] = False
    assert not resumed.replaced, "it was not convicted any more when the checkpoint was made"


def test_no_machine_is_named_where_it_is_not_known_which_it_was(run):
    run.convicted[CULPRIT] = True
    run.convictions.write()
    written = json.loads(run.file.read_text())
    (worker,) = written["workers"]
    assert worker["step"] is None and "not known" in worker["why"] and worker["rank"] == 2
    assert written["hosts"] == [] and written["deepspeed"] == ""


@pytest.mark.parametrize(
    "said",
    [
        None,
        3,
        [3, None],
        [{}],
        [{"worker": [[1], 2], "rank": 1, "device": {"host": "a", "slot": 0}, "step": 1, "why": ""}],
        [{"worker": [1], "rank": 1, "device": {}, "step": 1, "why": ""}],
        [{"worker": [1, 2], "rank": 1, "device": {"host": "two hosts", "slot": 0}, "step": 1, "why": ""}],
        [{"worker": [1, 2], "rank": 1, "device": {"host": "a", "slot": 0.5}, "step": 1, "why": ""}],
        [{"worker": [1, 2], "rank": 1, "device": {"host": "a", "slot": True}, "step": 1, "why": ""}],
        [{"worker": [1, 2.5], "rank": 1, "device": {"host": "a", "slot": 0}, "step": 1, "why": ""}],
        [{"worker": [True, 2], "rank": 1, "device": {"host": "a", "slot": 0}, "step": 1, "why": ""}],
        [{"worker": [1, 2], "rank": float("inf"), "device": {"host": "a", "slot": 0}, "step": 1, "why": ""}],
        [{"worker": [1, 2], "rank": -1, "device": {"host": "a", "slot": 0}, "step": 1, "why": ""}],
        [{"worker": [1, 2], "rank": 1, "device": {"host": "a", "slot": 0}, "step": float("nan"), "why": ""}],
        [{"worker": [1, 2], "rank": 1, "device": {"host": "a", "slot": 0}, "step": 10**40, "why": ""}],
        [{"worker": [1, 2], "rank": 1, "device": {"host": "a", "slot": 0}, "step": 1, "why": 7}],
        [{"worker": [1, 2], "rank": 1, "device": {"host": "a", "slot": 0}, "step": 1, "why": "", "proved": "no"}],
        [{"worker": [1, 2], "rank": 1, "device": {"host": "a", "slot": 0}, "step": 1, "why": "", "observed": 1}],
        [np.zeros(3)],
    ],
)
def test_what_is_none_in_a_checkpoint_is_left_out(said):
    assert read_saved(said) == {}
