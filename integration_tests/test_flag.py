"""The flag alone: in every form of config it is seen, in an installed wheel too, and without it nothing is called."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from integration_tests.harness import run_job
from integration_tests.processes import ROOT, base_environment, free_port, warm_extensions

SEEN = ("dict", "path", "comments", "base64", "args", "config_params", "zero 3", "transformers", "accelerate")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return run_job("integration_tests/jobs/flag.py", 1, 1, folder=tmp_path_factory.mktemp("flag")).check().results[0]


@pytest.mark.parametrize("form", SEEN)
def test_a_block_is_seen_in_every_form_of_config(told, form):
    (line,) = told["lines"][form]
    assert line.startswith("WARNING [sentinel] NOT guarding this DeepSpeedEngine: ")


def test_without_a_block_nothing_is_said(told):
    assert told["lines"]["plain"] == told["lines"]["plain file"] == told["lines"]["disabled"] == []
    assert told["untouched"]


def test_a_block_that_does_nothing_is_pointed_at(told):
    (line,) = told["lines"]["unsaid"]
    assert line == 'WARNING [sentinel] not guarding: the "sentinel" block has no "enabled": true'
    for name in ("sentinal", "Sentinel", "sentinels"):
        (line,) = told["lines"][name]
        assert line == f'WARNING [sentinel] "{name}" in the DeepSpeed config guards nothing; did you mean "sentinel"?'


def test_without_a_block_training_calls_nothing_of_ours(told):
    assert told["calls"]["training"] == {}
    assert told["calls"]["initialize"]["initialize"] == told["calls"]["initialize"]["block_of"] == 1


def test_what_deepspeed_refuses_is_refused_in_its_words(told):
    assert told["refused"]["no such file"].startswith("ValueError: Expected a string path to an existing deepspeed")
    assert told["refused"]["two configs"].startswith("AssertionError: Not sure how to proceed")
    assert "sentinel.strike: unknown key (value 3)" in told["refused"]["a mistake"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh environment with the wheel in it, outside the checkout: (folder, python). Other packages are lent."""
    folder = tmp_path_factory.mktemp("installed")
    build = ["egg_info", f"--egg-base={folder}", "build", f"--build-base={folder / 'build'}"]
    run([sys.executable, "setup.py", "--quiet", *build, "bdist_wheel", f"--dist-dir={folder}"], cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"])
    python = folder / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(run([python, "-c", ask]).stdout.strip())
    run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel])
    lent = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "lent.pth").write_text("\n".join(lent), encoding="utf-8")
    for name, copy in {"plain.py": "train.py", "torchrun.py": "torchrun.py"}.items():
        shutil.copy(ROOT / "integration_tests" / "jobs" / name, folder / copy)
    return folder, python


def run(command, cwd=None):
    environment = base_environment()
    del environment["PYTHONPATH"]  # the checkout
    command = [*map(str, command)]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def config_file(folder, block):
    fault = {"stage": 0, "replica": 1, "attack": "nan", "start_step": 2}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 1_000_000,
        **({"sentinel": {**block, "output_dir": str(folder / "logs"), "inject": [fault]}} if block else {}),
    }
    path = folder / "ds_config.json"
    path.write_text("// DeepSpeed reads comments\n" + json.dumps(config), encoding="utf-8")
    return path


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=4", "--master_port={port}"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus=4", "--master_port={port}"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=4", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port={port}"),
    ],
}


def arguments(folder, here, block):
    return [folder / "train.py", "--deepspeed_config", config_file(here, block), "--steps=4"]


def check_guarded(told, here):
    assert told.count("[sentinel] guarding 2 stages x 2 replicas, action 'quarantine'") == 1
    assert told.count("judging begins: ") == 1
    assert told.count("trained: finite True") == 4 and "nan" not in told.split("losses")[-1]
    events = [json.loads(line) for line in (here / "logs" / "events.jsonl").read_text().splitlines()]
    assert [event["columns"] for event in events if event["kind"] == "excluded"] == [[1], [1]]


BLOCK = {"enabled": True, "warmup_steps": 2}
SECOND = "the second begins\n"
UNGUARDED = """
import runpy, sys
script = sys.argv.pop(1)
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
ours = [name for name in sys.modules if name.startswith("deepspeed_sentinel")]
assert ours == ["deepspeed_sentinel", "deepspeed_sentinel.flag"], ours
print(sys.modules["deepspeed_sentinel"].__file__)
"""


@pytest.fixture(scope="module")
def trained(installed, tmp_path_factory):
    """The script without a block and with one, forked from one process: (what both wrote, the second's folder)."""
    folder, python = installed
    warm_extensions()
    here = {name: tmp_path_factory.mktemp(name) for name in ("unguarded", "guarded")}
    (folder / "unguarded.py").write_text(UNGUARDED, encoding="utf-8")
    without = [folder / "unguarded.py", *arguments(folder, here["unguarded"], None), "--stages=1"]
    guarded = arguments(folder, here["guarded"], BLOCK)
    first, second = (
        [f"--nproc_per_node={workers}", f"--master_port={free_port()}", "--monitor-interval=0.1", *map(str, command)]
        for workers, command in ((1, without), (4, guarded))
    )
    launch = f"import torchrun; torchrun.main({first}); print({SECOND!r}, end='', flush=True)"
    # the package's import alone changes nothing, and need not be made four times
    done = run([python, "-c", f"{launch}; import deepspeed_sentinel.engine.sentinel; torchrun.main({second})"], folder)
    assert "[sentinel]" not in done.stderr
    return done.stdout.split(SECOND), here["guarded"]


def test_an_installed_wheel_guards_an_unchanged_script_by_the_flag_alone(trained):
    (_, told), here = trained
    check_guarded(told, here)


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_installed_wheel_guards_under_every_launcher(installed, tmp_path, launcher):
    folder, python = installed
    warm_extensions()
    launch = [part.format(port=free_port()) for part in LAUNCHERS[launcher]]
    check_guarded(run([python, *launch, *arguments(folder, tmp_path, BLOCK)], cwd=tmp_path).stdout, tmp_path)


def test_an_installed_wheel_imports_and_says_nothing_without_a_block(installed, trained):
    folder, _ = installed
    (told, _), _ = trained
    assert told.splitlines()[-1].startswith(str(folder / "venv"))
    assert "trained: finite True" in told and "[sentinel]" not in told
