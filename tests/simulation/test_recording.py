"""A simulated run leaves what a live one leaves, and a report can be made of it."""

import json

import numpy as np
import pytest

from deepspeed_sentinel.__main__ import main
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.simulation.recording import Recorder
from deepspeed_sentinel.simulation.run import Simulation
from deepspeed_sentinel.telemetry.report.digest import digest
from deepspeed_sentinel.telemetry.report.reading import read_run


@pytest.fixture
def attacked(options, tmp_path):
    """A run in which (1, 2) turns signs from step 8 on, recorded: the simulation and its folder."""
    attack = {"attack": "scaling", "attack_arguments": {"factor": -1}, "malicious": 0.0, "attackers": ((1, 2),)}
    simulation = Simulation(options(**attack, steps=16, start=8, sentinel={"warmup_steps": 5}))
    recorder = Recorder(simulation, tmp_path / "logs")
    simulation.run(recorder.step)
    recorder.end()
    return simulation, tmp_path / "logs"


def test_what_is_written_is_what_happened(attacked):
    simulation, folder = attacked
    run = read_run(folder)
    document = digest(run)
    assert run.notes == [] and document["notes"] == []
    steps = [event for event in run.events if event["kind"] == "step"]
    assert [event["step"] for event in steps] == list(range(16))
    (end,) = [event for event in run.events if event["kind"] == "end"]
    tally = simulation.tally
    assert end["counts"]["judged_messages"] == tally.judged_messages
    assert end["counts"]["excluded_column_steps"] == tally.excluded_columns == document["cost"]["column_steps"]
    assert end["counts"]["skipped_steps"] == tally.skipped_steps
    assert [tuple(one) for one in end["convicted"]] == [tuple(one) for one in np.argwhere(tally.convicted).tolist()]
    assert document["deals"][-1]["wiring"] == simulation.dealer.wiring.tolist()
    assert Worker(1, 2) in end["convicted"] and document["workers"][0]["host"] == "simulated-0"
    assert document["run"]["injecting"] and "--exclude=simulated-0" in document["todo"]["lines"][-1]["text"]
    assert any(one["proofs"] for one in document["devices"])
    config = document["settings"]
    assert config["enabled"] and config["events"] == "steps", "as what is written here would be by a live run"


def test_the_command_records_and_reports(tmp_path, capsys):
    small = ["--steps", "8", "--start", "2", "--sequence", "16", "--micro-batch-size", "1", "--no-clean"]
    logs = str(tmp_path / "logs")
    mesh = ["--stages", "3", "--replicas", "3", "--out", str(tmp_path / "result.json"), "--events", logs]
    assert main(["simulate", *mesh, *small]) == 0
    capsys.readouterr()
    assert main(["report", logs, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"]["stages"] == 3 and document["run"]["last_step"] == 7 and document["run"]["finished"]


@pytest.mark.parametrize("arguments", [["--guard", "off"], ["--procedure", "paper"], ["--sweep", "a.toml"]])
def test_where_there_is_nothing_to_record_it_says_so(arguments, tmp_path, capsys):
    if "a.toml" in arguments:
        arguments = ["--sweep", str(tmp_path / "a.toml")]
        (tmp_path / "a.toml").write_text("")
    assert main(["simulate", "--events", str(tmp_path / "logs"), *arguments]) == 2
    assert "--events" in capsys.readouterr().err
