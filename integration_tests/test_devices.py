"""The ledger of devices in live runs: what was proved of a device is known wherever a later run meets it again.

Faults are injected, so it is a drill's ledger, and the runs that are to know of it are drills whose fault never begins.
All processes are of one host and have no GPU, so a device is the host's name and the process's number there.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario

START, STEPS = 1, 4
BASE = Scenario(name="first", steps=STEPS, micro_batches=1, hidden=16, lengths=(16,))
FAULT = {"stage": 1, "replica": 2, "attack": "low_precision", "start_step": START}
NEVER = {"stage": 1, "replica": 0, "attack": "low_precision", "start_step": 10**6}
SLOT = 5  # the process of worker (1, 2) where each stage has three replicas; of worker (2, 1) where it has two


def block(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    quick = {"warmup_steps": 2, "seed": 4, "twins": {"every": 2}}
    return {"enabled": True, "output_dir": str(folder / name), **quick, **more}


def known(folder: Path, file: str = "drill_ledger.json") -> dict[int, dict[str, Any]]:
    """What the file says of each process of this host."""
    devices = json.loads((folder / file).read_text())["devices"]
    host = socket.gethostname()
    return {places["places"][0]["slot"]: places["total"] for key, places in devices.items() if host in key}


def named(folder: Path) -> list[tuple[str, int, list[list[int]]]]:
    """Device events: why, of which process, and who runs on it now."""
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [
        (one["why"], int(one["device"].rpartition("/")[2]), one["workers"]) for one in events if one["kind"] == "device"
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def of_three(folder):
    scenarios = [
        BASE.with_(
            sentinel=block(folder, "logs", inject=[FAULT]),
            save={"directory": str(folder / "checkpoint"), "after_step": STEPS},
        ),
        BASE.with_(name="second", steps=1, sentinel=block(folder, "logs", inject=[NEVER])),
        BASE.with_(name="real", steps=1, sentinel=block(folder, "logs")),
        BASE.with_(
            name="observed",
            steps=2,
            sentinel=block(folder, "observed", action="observe", inject=[FAULT], twins={"every": 1}),
        ),
    ]
    return run_scenarios(scenarios, 3, 3, folder=folder / "three", timeout=400)


@pytest.fixture(scope="module")
def of_two(of_three, folder):
    loads = {"directory": str(folder / "checkpoint")}
    moved = block(folder, "moved", inject=[NEVER])
    scenarios = [BASE.with_(name="moved", steps=STEPS + 2, sentinel=moved, load=loads)]
    return run_scenarios(scenarios, 3, 2, folder=folder / "two", timeout=400)


def proofs(run) -> int:
    return sum(bool(verdict["proofs"]) for verdict in run.verdicts)


def test_a_proof_is_kept_by_device_and_named_when_the_next_run_starts_on_it(of_three, folder):
    first, second = of_three["first"][0], of_three["second"][0]
    assert proofs(first) >= 1 and proofs(second) == 0
    assert named(folder / "logs") == [("proof", SLOT, [[1, 2]])]
    said = of_three.job.stderr[0] + of_three.job.stdout[0]
    assert f"PROVED BEFORE to have done or reported something wrong: device cpu:{socket.gethostname()}" in said
    assert said.count("PROVED BEFORE") == 1
    totals = known(folder / "logs")
    assert sorted(totals) == list(range(9))
    assert [totals[slot]["proofs"] for slot in range(9)] == [proofs(first) * (slot == SLOT) for slot in range(9)]
    assert not any(one["proofs"] for one in known(folder / "logs", "ledger.json").values()), "of a run without faults"
    assert totals[0]["steps"] == sum(verdict["judged"] > 0 for verdict in first.verdicts) > 0


def test_report_only_counts_alike(of_three, folder):
    observed = of_three["observed"][0]
    assert proofs(observed) >= 1 and known(folder / "observed")[SLOT]["proofs"] == proofs(observed)
    assert not any(any(verdict["excluded"]) for verdict in observed.verdicts)


def test_the_first_stages_file_alone_holds_the_ledger_and_nothing_but_numbers(of_three, folder):
    files = sorted((folder / "checkpoint").rglob("mp_rank_*model_states.pt"))
    states = [torch.load(file, map_location="cpu", weights_only=False)["deepspeed_sentinel"] for file in files]
    assert ["drill_ledger" in state for state in states] == [True, False, False]
    assert states[0]["drill_ledger"]["json"].dtype == torch.uint8


def test_in_another_mesh_the_checkpoint_tells_of_the_device_where_it_is_now(of_three, of_two, folder):
    (run, *_) = of_two["moved"]
    assert run.record["loaded"] and len(run.verdicts) == 2
    said = of_two.job.stderr[0] + of_two.job.stdout[0]
    assert "is of a run with replicas 3 (here 2): baselines, fences and convictions start anew" in said.replace(
        "\n", ""
    )
    assert not any(map(any, run.verdicts[-1]["convicted"])), "no conviction without a proof in this run"
    assert named(folder / "moved") == [("proof", SLOT, [[2, 1]])]
    before, here = known(folder / "logs"), known(folder / "moved")
    assert {slot: one["proofs"] for slot, one in here.items()} == {slot: before[slot]["proofs"] for slot in range(9)}
