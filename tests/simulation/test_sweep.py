"""Sweeps: all combinations, each once, also after an interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepspeed_sentinel.__main__ import main
from deepspeed_sentinel.simulation import sweep as sweeps
from deepspeed_sentinel.simulation.sweep import Sweep, read_table, write_parquet
from integration_tests.variants import some

BASE = """
[base]
stages = 4
replicas = 4
steps = 4
start = 2
sequence = 16
micro_batch_size = 1
"""
FILE = f"""
out = "table.jsonl"
{BASE}
[grid]
seed = [0, 1]
[[attack]]
name = "scaling"
vary = {{factor = [-1, 2]}}
[[attack]]
name = "mixed"
arguments = {{attacks = ["nan", "constant"]}}
"""


def write(folder, text):
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def test_all_combinations(tmp_path):
    sweep = Sweep.read(write(tmp_path, FILE))
    told = {(run.attack, json.dumps(run.attack_arguments), run.seed) for run in sweep.runs}
    assert len(told) == len(sweep.runs) == 6
    assert ("scaling", '{"factor": 2}', 1) in told and ("mixed", '{"attacks": ["nan", "constant"]}', 0) in told
    assert sweep.out == tmp_path / "table.jsonl"


@pytest.mark.parametrize("where", some(("this process", "its own"), ("this process",)))
def test_a_sweep_is_resumed_where_it_stopped(tmp_path, capsys, monkeypatch, where):
    """Which runs are done and what is written; a process of its own, as the tests below have, loads torch anew."""
    if where == "this process":
        monkeypatch.setattr(sweeps, "one_thread_pool", lambda processes: ThreadPoolExecutor(1))
    path = write(tmp_path, FILE.replace("seed = [0, 1]", "seed = [0]"))
    assert main(["simulate", "--sweep", str(path), "--processes", "2"]) == 0
    table, clean = tmp_path / "table.jsonl", tmp_path / "table_clean.jsonl"
    lines = table.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    (honest,) = [json.loads(line) for line in clean.read_text().splitlines()]
    assert all(json.loads(line)["loss"]["clean"] == honest["loss"]["clean"] for line in lines)
    # As after a crash: one run is missing, another's line was cut short.
    table.write_text(lines[1] + lines[2][:40])
    kept = json.loads(lines[1])
    assert main(["simulate", "--sweep", str(path), "--processes", "1"]) == 0
    rows = read_table(table)
    assert len(rows) == 3 and table.read_text().startswith(lines[1])
    assert rows[kept["key"]] == kept, "what was done is not done again"
    again = {key: row["loss"] for key, row in rows.items()}
    assert again == {json.loads(line)["key"]: json.loads(line)["loss"] for line in lines}


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, capsys):
    attack = tmp_path / "bad.py"
    attack.write_text("class Bad:\n    def __call__(self, message, context):\n        raise KeyError('gone')\n")
    file = f'clean = false\n{BASE}\n[[attack]]\nname = "{attack}:Bad"\n[[attack]]\nname = "scaling"\n'
    assert main(["simulate", "--sweep", str(write(tmp_path, file)), "--processes", "1"]) == 1
    assert "attack Bad (forward" in capsys.readouterr().out
    (row,) = read_table(tmp_path / "sweep.jsonl").values()
    assert row["attack"]["name"] == "scaling" and row["loss"]["clean"] is None


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_sweep_that_is_ended(tmp_path, how):
    file = f"clean = false\n{BASE.replace('steps = 4', 'steps = 100000')}"
    command = [sys.executable, "-m", "deepspeed_sentinel", "simulate", "--sweep", str(write(tmp_path, file))]
    command += ["--processes=1"]
    # Its children are found by their process group.
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as sweep:
        try:
            wait_until(lambda: len(group_members(sweep.pid)) > 2, "no process was started")
            sweep.send_signal(how)
            assert sweep.wait(60) == (130 if how == signal.SIGTERM else -how)
            wait_until(lambda: not group_members(sweep.pid), "a process is left")
        finally:
            for member in group_members(sweep.pid):
                os.kill(member, signal.SIGKILL)


def group_members(group):
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members


def wait_until(condition, complaint):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.2)


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {
        "key": "k",
        "loss": {"clean": 1.5, "attacked": None},
        "attack": {"arguments": {"factor": 2}},
        "convicted": [],
    }
    write_parquet(tmp_path / "t.parquet", [row])
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == [
        {"key": "k", "loss.clean": 1.5, "loss.attacked": None, "attack.arguments": '{"factor": 2}', "convicted": "[]"}
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds = [1]", "unknown seeds; allowed: attack, base, clean, grid, out"),
        ("[base]\nstage = 4", "base: unknown stage; allowed: attackers, change, "),
        ("[grid]\nseed = 1", "grid: seed must be a list"),
        ("[[attack]]\nname = 'scaling'\nfactor = 2", "attack: unknown factor; allowed: name, arguments, vary"),
        ("[[attack]]\nname = 'magic'", "'magic' is unknown"),
        ("[grid]\nseed = [1, 1]", "two runs of it are the same"),
        ("out = 'table.csv'", "must end in .jsonl or .parquet"),
        ("[base", "sweep.toml"),
    ],
)
def test_mistakes_in_a_sweep_file_are_named(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        Sweep.read(write(tmp_path, text))
