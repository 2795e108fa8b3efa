"""The ledger through runs of one process that is rank 0 of a mesh whose other ranks are made up; the file is real."""

import fcntl
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deepspeed.runtime.pipe.topology import ProcessTopology
from deepspeed.utils import logger

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import CULPRIT, World, tamper

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine import devices as module
from deepspeed_sentinel.engine.devices import WRITE_SECONDS, DeviceRecord, gather_devices
from deepspeed_sentinel.engine.reduction import Poisoned
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.judgement.trial import Proof
from deepspeed_sentinel.judgement.unsettled import Contradicted
from deepspeed_sentinel.mesh import Mesh, Worker
from deepspeed_sentinel.telemetry.devices import Device, to_bytes
from deepspeed_sentinel.telemetry.who import Who

MESH = Mesh(4, 3)
RANKS = np.arange(12).reshape(4, 3)
KEY = "gpu:uuid-5"
CPU = torch.device("cpu")


class Run:
    """One attached Sentinel, as far as its ledger goes. ``places[rank]``: the number of the device that it runs on."""

    def __init__(self, folder, places=range(12), **block):
        self.folder, self.now, self.at = folder, 0.0, 0
        config = SentinelConfig.parse({"enabled": True, "output_dir": str(folder), **block})
        said = torch.stack([torch.from_numpy(to_bytes(Device("host", at, f"uuid-{at}"))) for at in places])
        control = SimpleNamespace(all_gather=lambda mine: said, of_first=lambda text: text)
        devices, told = gather_devices(control, RANKS, CPU)
        self.telling = Telling(config, MESH, control, Who(RANKS, devices))
        self.telling.ledger(told)
        self.record = DeviceRecord(config, devices, control, self.telling, step=lambda: self.at, clock=lambda: self.now)
        self.record.begin()

    def step(self, verdict, poisoned=None, unequal=(), seconds=1.0):
        self.at, self.now = verdict.step, self.now + seconds
        self.record.step(verdict, np.tile(np.arange(3), (4, 1)), poisoned, unequal)

    def end(self):
        self.record.close()
        self.telling.close()

    def standing(self, key=KEY):
        (one,) = [one for one in self.record.ledger.standings() if one.key == key]
        return one

    def events(self):
        events = map(json.loads, (self.folder / "events.jsonl").read_text().splitlines())
        return [(one["why"], one["device"], one["workers"]) for one in events if one["kind"] == "device"]


@pytest.fixture
def honest():
    return World().warm_up(40)[-10:]


@pytest.fixture
def said(one_rank):
    """What rank 0 warns of."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def proving(verdict, worker=CULPRIT):
    return replace(verdict, proofs=(Proof(worker, worker.replica, 0, (0, 1), 2, 3, False),) * 2)


def known_of(folder):
    return json.loads((folder / "ledger.json").read_text())["devices"]


def test_a_proof_is_in_the_file_at_once_and_named_when_a_run_starts_on_the_device(said, honest, tmp_path):
    first = Run(tmp_path)
    first.step(honest[0])
    assert not (tmp_path / "ledger.json").exists()
    first.step(proving(honest[1]))
    assert known_of(tmp_path)[KEY]["total"]["proofs"] == 1, "one a worker and step"
    first.step(proving(honest[2]))
    assert known_of(tmp_path)[KEY]["total"]["proofs"] == 1, "then as often as anything else"
    first.end()
    assert known_of(tmp_path)[KEY]["total"] == {**known_of(tmp_path)[KEY]["total"], "proofs": 2, "steps": 3}
    assert not said and not first.events(), "its proofs were told as what they were"

    other = Run(tmp_path, places=[5, *range(20, 31)])
    assert other.events() == [("proof", KEY, [[0, 0]])]
    assert f"step 0: PROVED BEFORE to have done or reported something wrong: device {KEY}" in said[0]
    other.end()
    elsewhere = Run(tmp_path, places=range(20, 32))
    elsewhere.end()
    assert len(said) == 1


DRILL = {"inject": [{"stage": 1, "replica": 2, "attack": "scaling"}]}


def test_a_drill_says_nothing_of_a_device(said, honest, tmp_path):
    """Neither in the folder of a run nor in a checkpoint; drills know of each other."""
    drill = Run(tmp_path, **DRILL)
    drill.step(proving(honest[0]))
    state = drill.record.state_dict()
    drill.end()
    assert sorted(path.name for path in tmp_path.glob("*ledger.json")) == ["drill_ledger.json"]
    real = Run(tmp_path)
    real.record.load_state_dict(state)
    real.step(honest[1])
    real.end()
    assert not said and not real.events() and known_of(tmp_path)[KEY]["total"]["proofs"] == 0
    again = Run(tmp_path, **DRILL)
    assert again.events() == [("proof", KEY, [[1, 2]])] and len(said) == 1
    again.end()


def test_who_was_proved_by_several_partners_is_named_too(said, honest, tmp_path):
    """It reports falsely, or makes other things: its machine is no better than one that an exact comparison found."""
    first = Run(tmp_path)
    partners = (Worker(CULPRIT.stage + 1, 0), Worker(CULPRIT.stage + 1, 1))
    first.step(replace(honest[0], contradicted=(Contradicted(CULPRIT, partners),)))
    assert known_of(tmp_path)[KEY]["total"]["proofs"] == 1
    first.end()
    Run(tmp_path, places=[5, *range(20, 31)]).end()
    assert f"PROVED BEFORE to have done or reported something wrong: device {KEY}" in said[0]


def test_reductions_and_weights_are_counted(said, honest, tmp_path):
    run = Run(tmp_path)
    run.step(proving(honest[0]), Poisoned(0, (Worker(1, 0),), (CULPRIT,)), (Worker(0, 0),))
    run.step(honest[1], Poisoned(1, (Worker(3, 0),), (Worker(3, 1),)))
    assert (run.standing().proofs, run.standing("gpu:uuid-10").proofs) == (1, 1)
    assert run.standing("gpu:uuid-0").unequal_weights == 1
    assert known_of(tmp_path)["gpu:uuid-0"]["total"]["unequal_weights"] == 1
    run.end()


def test_it_is_written_now_and_then(said, honest, tmp_path):
    run = Run(tmp_path)
    run.step(honest[0], seconds=WRITE_SECONDS - 1)
    assert not (tmp_path / "ledger.json").exists()
    run.step(honest[1], seconds=2)
    assert known_of(tmp_path)[KEY]["total"]["steps"] == 2
    run.step(honest[2], seconds=WRITE_SECONDS - 1)
    assert known_of(tmp_path)[KEY]["total"]["steps"] == 2
    run.end()
    assert known_of(tmp_path)[KEY]["total"]["steps"] == 3


def test_a_checkpoint_knows_the_device_elsewhere_and_takes_nothing_back(said, honest, tmp_path):
    run = Run(tmp_path / "one", events="none")
    run.step(proving(honest[0]))
    state = run.record.state_dict()
    run.step(honest[1])
    run.record.load_state_dict({"judge": {}, **state})
    assert (run.standing().steps, run.standing().proofs) == (2, 1), "a rollback takes no count back"
    assert not said and not (tmp_path / "one").exists()
    run.end()

    resumed = Run(tmp_path / "two", places=[*range(20, 31), 5])
    assert not said
    resumed.record.load_state_dict(state)
    resumed.record.load_state_dict(state)
    assert resumed.events() == [("proof", KEY, [[3, 2]])] and len(said) == 1
    assert (resumed.standing().steps, resumed.standing().proofs) == (1, 1)
    resumed.end()


@pytest.mark.parametrize(
    "state", [None, [], {"ledger": None}, {"ledger": {}}, {"ledger": {"json": "text"}},
              {"ledger": {"json": torch.zeros(3, dtype=torch.bfloat16)}}, {"ledger": {"json": torch.ones(3).byte()}}],
)  # fmt: skip
def test_a_checkpoint_without_a_ledger_that_can_be_read_ends_no_run(said, honest, tmp_path, state):
    run = Run(tmp_path)
    run.step(honest[0])
    run.record.load_state_dict(state)
    run.end()
    assert run.standing().steps == 1
    assert all("the checkpoint's ledger of devices is left out" in line for line in said)
    assert len(said) == bool(isinstance(state, dict) and state["ledger"] is not None)


def acquitted(verdict, *but):
    """A verdict in which nobody is convicted but those."""
    convicted = np.zeros_like(verdict.convicted)
    for worker in but:
        convicted[worker] = True
    return replace(verdict, convicted=convicted)


def test_a_rate_above_the_peers_is_told_once_and_convicts_nobody(said, tmp_path):
    world = World()
    world.warm_up()

    run = Run(tmp_path)
    for _ in range(12):
        run.step(acquitted(world.step(tamper), Worker(2, 0)))
    assert run.standing().alarmed_steps == 12
    run.record.write()
    run.end()
    assert run.events() == [("rate", KEY, [[1, 2]])]
    (line,) = said
    assert "more alarms than its peers, which convicts nobody: device gpu:uuid-5" in line
    again = Run(tmp_path)
    assert not again.record.ledger.named()
    again.end()


def test_the_rate_of_a_convicted_workers_device_is_not_told_before_it_is_released(said, tmp_path):
    world = World()
    world.warm_up()
    run = Run(tmp_path)
    for _ in range(12):
        verdict = world.step(tamper)
        run.step(verdict)
    assert verdict.convicted[CULPRIT] and run.standing().alarmed_steps == 12
    run.record.write()
    assert not said and not run.events(), "the conviction has told of it"
    run.step(acquitted(world.step(None)))
    run.end()
    assert run.events() == [("rate", KEY, [[1, 2]])]


@pytest.mark.parametrize("action", ["exclude", "observe"])
def test_a_disk_that_fails_ends_no_run_and_loses_nothing(said, honest, tmp_path, monkeypatch, action):
    run = Run(tmp_path / "logs", action=action)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", full)
        run.step(proving(honest[0]))
        run.step(honest[1], seconds=2 * WRITE_SECONDS)
    (line,) = said
    assert "cannot be written: [Errno 28] No space left" in line
    assert run.standing().steps == 2 and not (tmp_path / "logs" / "ledger.json").exists()
    run.end()
    assert known_of(tmp_path / "logs")[KEY]["total"]["steps"] == 2
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        "events.jsonl", "ledger.json", "ledger.json.lock",
    ]  # fmt: skip


def test_a_broken_file_is_set_aside(said, honest, tmp_path):
    (tmp_path / "ledger.json").write_text('{"schema": 1, "dev')
    run = Run(tmp_path)
    run.step(honest[0])
    run.end()
    assert known_of(tmp_path)[KEY]["total"]["steps"] == 1
    (line,) = said
    assert "set aside as ledger.json.broken-1" in line and (tmp_path / "ledger.json.broken-1").exists()


def test_a_file_that_cannot_be_had_is_an_error_of_the_settings_on_every_rank(said, tmp_path):
    (tmp_path / "ledger.json").mkdir()
    with pytest.raises(ValueError, match=r"sentinel\.output_dir: cannot keep a ledger of devices.*ledger\.json"):
        Run(tmp_path)
    Run(tmp_path, events="none").end()


def test_a_proof_that_was_out_of_reach_when_the_run_began_is_told_once_it_is_read(said, honest, tmp_path, monkeypatch):
    before = Run(tmp_path)
    before.step(proving(honest[0]))
    before.end()
    with monkeypatch.context() as busy:
        busy.setattr("deepspeed_sentinel.telemetry.bookfile._PATIENCE", 0.0)
        with (tmp_path / "ledger.json.lock").open("a") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            run = Run(tmp_path)
    assert ["the ledger is read later" in line for line in said] == [True]
    run.record.write()
    assert run.events() == [("proof", KEY, [[1, 2]])]
    run.end()


def test_other_ranks_keep_nothing(one_rank, honest, tmp_path, monkeypatch):
    monkeypatch.setattr(module.dist, "get_rank", lambda: 4)
    run = Run(tmp_path)
    run.step(proving(honest[0]))
    run.record.load_state_dict({"ledger": {}})
    run.end()
    assert run.record.ledger is None and run.record.state_dict() == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize("axes", [["pipe", "data"], ["data", "pipe"], ["model", "data", "pipe"]])
def test_rank_0_is_the_first_worker_in_any_topology(axes):
    """So the first stage's checkpoint file, which replica 0 writes, is its own."""
    topology = ProcessTopology(axes=axes, dims=[1 if axis == "model" else 3 for axis in axes])
    assert topology.get_rank(**dict.fromkeys(axes, 0)) == 0
