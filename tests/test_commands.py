"""The command line: every help has an example, ``check`` answers at once, and nothing is coloured off a terminal."""

import json
import subprocess
import sys

import pytest

from deepspeed_sentinel.__main__ import main

COMMANDS = ("run", "check", "report", "demo", "attacks", "simulate")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"] if command else ["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "\x1b" not in said
    assert f"example:\n  python -m deepspeed_sentinel {command or 'check'}" in said
    assert all(f"    {name} " in said for name in COMMANDS if not command), "the first help lists all commands"


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
