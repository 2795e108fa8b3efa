"""The command line: every help has an example, ``check`` answers at once, and nothing is coloured off a terminal."""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from deepspeed_sentinel.__main__ import main
from deepspeed_sentinel.simulation import cli

COMMANDS = ("run", "check", "report", "demo", "attacks", "simulate")


def help_of(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"] if command else ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("called", ["/usr/bin/deepspeed-sentinel", "/usr/lib/deepspeed_sentinel/__main__.py"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_has_an_example_by_the_name_that_was_called(command, called, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called])
    said = help_of(command, capsys)
    program = "deepspeed-sentinel" if called.endswith("sentinel") else "python -m deepspeed_sentinel"
    assert "\x1b" not in said and said.startswith(f"usage: {program} {command or '[-h]'}")
    assert f"example:\n  {program} {command or 'check'}" in said
    assert all(f"    {name} " in said for name in COMMANDS if not command), "the first help lists all commands"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_what_people_read_has_no_markup(command, capsys):
    assert "`" not in help_of(command, capsys)


def test_the_help_of_simulate_is_in_groups(capsys):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    groups = {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}
    assert list(groups)[2:] == ["mesh", "attack", "model and data", "judgement", "output and sweeps"]
    assert groups["options"] == {"help"} and {"stages", "replicas"} <= groups["mesh"]
    assert {"attack", "attacker", "malicious", "start", "direction"} <= groups["attack"]
    assert {"out", "events", "sweep", "processes"} <= groups["output and sweeps"]


def test_check_loads_neither_torch_nor_numpy(tmp_path):
    """They would take most of the time in which it should have answered."""
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({"sentinel": {"enabled": True, "action": "halt"}}))
    code = (
        "import sys\nfrom deepspeed_sentinel.__main__ import main\n"
        f"assert main(['check', {str(file)!r}]) == 0\n"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *said, loaded = done.stdout.splitlines()
    assert loaded == "[]" and ' * action = "halt"' in said and "\x1b" not in done.stdout


def test_check_knows_attacks_where_faults_are_injected(tmp_path, capsys):
    file = tmp_path / "ds_config.json"
    block = {"enabled": True, "inject": [{"stage": 1, "replica": 0, "attack": "magic"}]}
    file.write_text(json.dumps({"sentinel": block}))
    assert main(["check", str(file)]) == 1
    assert "magic" in capsys.readouterr().err


def test_the_version_is_the_installed_one(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"deepspeed-sentinel {version('deepspeed-sentinel')}"
    assert f"torch {version('torch')}" in said and f"deepspeed {version('deepspeed')}" in said


def test_an_unknown_attack_names_apart_what_only_the_simulator_has(tmp_path, capsys):
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({"sentinel": {"inject": [{"stage": 1, "replica": 0, "attack": "magic"}]}}))
    assert main(["check", str(file)]) == 1
    live, simulated = capsys.readouterr().err.split("in the simulator alone: ")
    assert "scaling" in live and "cautious" not in live and "wrong_gradients" in simulated
