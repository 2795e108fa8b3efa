"""The flag: deepspeed.initialize is wrapped whatever is imported first and however, and nothing else is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# torch runs the entry points as the real one does, and deepspeed imports it before any part of itself
TORCH = """
from importlib.metadata import entry_points
for point in entry_points(group="torch.backends"):
    point.load()()
"""
DEEPSPEED = """
import os, sys
import torch
if "BROKEN" in os.environ:
    del os.environ["BROKEN"]
    raise ImportError("broken")
from . import part
early = hasattr(sys.modules[__name__], "initialize")
def __getattr__(name):
    raise AttributeError(f"no {name} here")
def initialize(*args, config=None):
    "The original."
    return [type("Engine", (), {"config": config, "args": args})()]
"""
WRAPPED = "hasattr({}, 'guarded_by_sentinel')"
NOTHING_LEFT = """
import sys, types, deepspeed
assert type(deepspeed) is types.ModuleType, type(deepspeed)
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "deepspeed_sentinel.flag"]
assert deepspeed.early is False
ours = {name for name in sys.modules if name.startswith("deepspeed_sentinel.")}
assert ours <= {"deepspeed_sentinel.flag"}, ours
"""


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """What an installation leaves beside the package: its entry points."""
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture
def run(metadata, tmp_path):
    """Run a script in a fresh process, with stand-ins of torch and deepspeed; returns what it printed."""
    for name, source in {"torch": TORCH, "deepspeed": DEEPSPEED}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
    (tmp_path / "deepspeed" / "part.py").write_text("")

    def fresh(script: str, **environment: str) -> str:
        path = os.pathsep.join(map(str, (tmp_path, metadata, ROOT)))
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": path, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return fresh


@pytest.mark.parametrize(
    ("imports", "function"),
    [
        ("import deepspeed", "deepspeed.initialize"),
        ("import torch, deepspeed", "deepspeed.initialize"),
        ("from deepspeed import initialize", "initialize"),
        ("import torch\nfrom deepspeed import initialize", "initialize"),
        ("import deepspeed.part as part\nfrom deepspeed import *", "initialize"),
        ("import deepspeed as ds", "getattr(ds, 'initialize')"),
    ],
)
def test_whatever_is_imported_first(run, imports, function):
    script = f"{imports}\nassert {WRAPPED.format(function)}\nassert {function}.__doc__ == 'The original.'\n"
    assert run(script + NOTHING_LEFT) == ""


def test_it_can_be_switched_off(run):
    script = f"from deepspeed import initialize\nassert not {WRAPPED.format('initialize')}\n{NOTHING_LEFT}"
    assert run(script, DEEPSPEED_SENTINEL="0") == ""


def test_an_import_that_failed_may_be_tried_again(run):
    script = f"""
try:
    import deepspeed
except ImportError:
    import deepspeed
assert {WRAPPED.format("deepspeed.initialize")}
"""
    assert run(script + NOTHING_LEFT, BROKEN="1") == ""


def test_who_puts_another_function_there_has_it(run):
    script = "import deepspeed\ndeepspeed.initialize = len\nassert deepspeed.initialize is len\n"
    assert run(script + NOTHING_LEFT) == ""


def test_a_stand_in_for_deepspeed_is_left_alone(run):
    script = """
import sys
from unittest.mock import MagicMock
sys.modules["deepspeed"] = stand_in = MagicMock()
sys.modules["deepspeed.part"] = MagicMock()
import torch
import deepspeed.part
assert deepspeed is stand_in and isinstance(deepspeed.initialize, MagicMock)
"""
    assert run(script) == ""


def test_a_module_that_cannot_be_watched_breaks_no_import(run):
    script = """
import sys, types
class Odd(types.ModuleType):
    __slots__ = ("more",)
    def __init_subclass__(cls):
        raise TypeError("not to be extended")
sys.modules["deepspeed"] = Odd("deepspeed")
import torch
print(type(sys.modules["deepspeed"]).__name__)
"""
    told = run(script)
    assert told.startswith("Odd\n") and "does nothing in this process: not to be extended" in told


@pytest.mark.parametrize("config", ['{"train_batch_size": 8}', "{}", '{"sentinel": None}'])
def test_without_a_block_nothing_is_said_and_nothing_imported(run, config):
    script = f"import deepspeed\n(engine,) = deepspeed.initialize(1, 2, config={config})\n"
    script += "assert engine.args == (1, 2)\n"
    assert run(script + NOTHING_LEFT) == ""
