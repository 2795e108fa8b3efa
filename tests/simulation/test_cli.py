"""The command line: one run, its result file, and errors that say what is wrong."""

import json

import pytest

from deepspeed_sentinel.__main__ import main
from deepspeed_sentinel.attacks import attack_names
from deepspeed_sentinel.simulation.cli import summary

MESH = ["simulate", "--stages", "4", "--replicas", "4"]
RUN = [*MESH, "--steps", "4", "--start", "2", "--sequence", "16", "--micro-batch-size", "1"]
KEYS = [
    "mesh", "attack", "malicious", "convicted", "precision", "recall", "f1", "detection_steps_mean",
    "detection_steps_max", "judged_messages", "false_alarms", "false_convictions", "false_alarm_rate", "loss",
    "seconds",
]  # fmt: skip


def simulate(folder, *arguments):
    out = folder / "deep" / "result.json"
    status = main([*RUN, "--out", str(out), *arguments])
    return status, json.loads(out.read_text()) if out.exists() else None


def test_a_run_writes_its_result(tmp_path, capsys):
    status, result = simulate(tmp_path, "--attack", "nan", "--attack-arg", "rate=0.5", "--direction", "forward")
    assert status == 0
    assert list(result)[: len(KEYS)] == KEYS
    assert result["mesh"] == {"stages": 4, "replicas": 4}
    assert result["attack"]["name"] == "nan" and result["attack"]["arguments"] == {"rate": 0.5}
    assert result["loss"]["attacked"] is None and result["loss"]["clean"] > 0 and result["loss"]["guarded"] > 0
    assert "F1" in capsys.readouterr().out


def test_without_an_attack_clean_and_guarded_are_the_same_training(tmp_path):
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps({"sentinel": {"action": "observe"}}))
    _, result = simulate(tmp_path, "--config", str(config))
    assert result["loss"]["clean"] == result["loss"]["guarded"]
    assert result["malicious"] == [] and result["f1"] is None
    _, alone = simulate(tmp_path, "--no-clean")
    assert alone["loss"]["clean"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attack", "magic"], "attack 'magic' is unknown; allowed: bias"),
        (["--attack", "scaling", "--attack-arg", "speed=1"], "its arguments are: factor"),
        (["--attack", "scaling", "--attack-arg", "factor"], "NAME=VALUE"),
        (["--attack-arg", "factor=1"], "without --attack"),
        (["--attack", "nan", "--attacker", "1"], "--attacker must be STAGE,REPLICA"),
        (["--attack", "nan", "--attacker", "3,0"], "stages from 1 to 2 and replicas from 0 to 3, got [3, 0]"),
        (["--attack", "nan", "--malicious", "0.5"], "fewer than half"),
        (["--attack", "nowhere.py:Mine"], "there is no file"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--sweep", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_bad_options_exit_with_2_and_say_why(tmp_path, capsys, arguments, said):
    assert simulate(tmp_path, *arguments)[0] == 2
    assert said in capsys.readouterr().err


def test_an_attack_of_a_users_own(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "class Louder:\n    def __init__(self, by=2.0):\n        self.by = by\n"
        "    def __call__(self, message, context):\n        return message * self.by\n"
        "class Cuts:\n    def __call__(self, message, context):\n        return message[..., :1]\n"
    )
    status, result = simulate(tmp_path, "--attack", f"{file}:Louder", "--attack-arg", "by=3", "--no-clean")
    assert status == 0 and len(result["malicious"]) == 2
    capsys.readouterr()
    assert simulate(tmp_path, "--attack", f"{file}:Cuts", "--no-clean")[0] == 1
    error = capsys.readouterr().err
    assert "attack Cuts (forward, stage 1" in error and "but returned torch.float32 (1, 16, 1)" in error


def test_attacks_are_listed_with_their_arguments(capsys):
    assert main(["attacks"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}(" in listed for name in attack_names())
    assert "scaling(factor=-1.0)\n    The message times 'factor'." in listed and "`" not in listed


RESULT = {
    "malicious": [[1, 0]], "convicted": [[1, 0]], "false_convictions": 0, "f1": 1.0, "precision": 1.0, "recall": 1.0,
    "detection_steps_mean": 2.0, "detection_steps_max": 2, "judged_messages": 96, "false_alarms": 0,
    "false_alarm_rate": 0.0, "loss": {"clean": 4.0, "attacked": None, "guarded": 4.1}, "seconds": 3.0,
    "details": {"seconds_a_step": 0.1, "guard": "on"},
}  # fmt: skip
NOBODY = {"malicious": [], "convicted": [], "f1": None, "precision": None, "recall": None,
          "detection_steps_mean": None, "detection_steps_max": None}  # fmt: skip


def test_the_summary_says_what_was_not_run():
    assert "held-out loss: clean 4.000, attacked (no guard) not run, guarded 4.100" in summary(RESULT)
    assert "1 malicious worker, 1 convicted, 0 of them wrongly: F1 1.000" in summary(RESULT)
    unfound = {**RESULT, "convicted": [], "f1": 0.0, "precision": None, **dict.fromkeys(list(NOBODY)[5:])}
    assert "F1 0.000, precision undefined" in summary(unfound)
    assert "first alarm of a malicious worker: none" in summary(unfound)
    honest = summary({**RESULT, **NOBODY})
    assert "nobody tampered, 0 convicted" in honest and "F1" not in honest and "first alarm" not in honest
    assert not {"-", "None"} & set(honest.replace(",", " ").split())
    one_each = summary({**RESULT, "judged_messages": 1, "false_alarms": 1, "false_alarm_rate": 1.0})
    assert "\n1 message judged, 1 false alarm (100.00%)\n" in one_each
    unguarded = summary({
        **RESULT, "convicted": [], "judged_messages": 0, "false_alarm_rate": None, "details": {**RESULT["details"],
        "guard": "off"}, "loss": {"clean": 4.0, "attacked": 5.0, "guarded": None},
    })  # fmt: skip
    assert "1 malicious worker; not judged, since the guard is off" in unguarded and "guarded not run" in unguarded
    assert "F1" not in unguarded and "messages" not in unguarded


def test_a_run_says_where_it_wrote(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, "--no-clean", "--events", "logs"]) == 0
    said = capsys.readouterr().out
    assert f"Result written to {tmp_path / 'result.json'}" in said and "--out FILE writes it elsewhere" in said
    assert f"Events written to {tmp_path / 'logs'}: deepspeed-sentinel report {tmp_path / 'logs'} shows them" in said
    assert main([*RUN, "--no-clean", "--out", "mine.json"]) == 0
    said = capsys.readouterr().out
    assert f"Result written to {tmp_path / 'mine.json'}" in said and "elsewhere" not in said
