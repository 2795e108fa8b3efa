"""Every name of DeepSpeed's that is touched is looked for, and who lacks one hears which."""

import ast
import importlib
from pathlib import Path

import deepspeed
import pytest
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from deepspeed_sentinel import flag
from deepspeed_sentinel.engine import access, internals

ROOT = Path(internals.__file__).resolve().parents[1]
ENGINES = ("engine", "self._engine", "self.engine", "self.deepspeed")
OURS = {"sentinel", "_sentinel_message_shapes"}
MODULES = {"p2p": "deepspeed.runtime.pipe.p2p", "schedule": "deepspeed.runtime.pipe.schedule"}


class Whole:
    """What an engine has, part by part, with nothing behind it."""

    def __init__(self, names):
        for name in names:
            setattr(self, name, None)


def whole_engine():
    """Of a class of its own, so that a property need not find what it computes from."""
    values = dict.fromkeys(internals._ENGINE.split())
    values |= {part: Whole(names.split()) for part, names in internals._BELOW.items()}
    values["_INSTRUCTION_MAP"] = {getattr(schedule, name): None for name in internals._INSTRUCTIONS.split()}
    methods = {name for name in values if callable(getattr(PipelineEngine, name, None))}
    kind = type("Engine", (PipelineEngine,), {name: values[name] for name in values.keys() - methods})
    engine = kind.__new__(kind)
    nn.Module.__init__(engine)  # for DeepSpeed 0.16, which looks through a module for what an engine lacks
    return engine


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(flag, "say", lines.append)
    return lines


def touched():
    """(what stands before the dot, name), of all code that knows an engine."""
    for path in (*ROOT.joinpath("engine").glob("*.py"), *ROOT.joinpath("hf").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                yield ast.unparse(node.value), node.attr
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("deepspeed."):
                yield from ((node.module, alias.name) for alias in node.names)
    yield from (("engine", name) for name in importlib.import_module("deepspeed_sentinel.engine.sentinel")._WRAPPED)


def test_the_table_has_every_name_that_is_touched_and_no_other():
    found = set(touched())
    of_engine = {name for owner, name in found if owner in ENGINES} - OURS
    assert of_engine - {"name"} == set(internals._ENGINE.split())
    for part, names in internals._BELOW.items():
        of_part = {name for owner, name in found if owner in {f"{engine}.{part}" for engine in ENGINES}}
        assert of_part == set(names.split()), part
    for short, path in MODULES.items():
        assert {name for owner, name in found if owner == short} <= set(internals._MODULES[path].split()), short
    inside = {(owner, name) for owner, name in found if owner.startswith("deepspeed.runtime.")}
    imported = {(owner, name) for owner, name in inside if name not in MODULES}
    assert imported <= {(path, name) for path, names in internals._MODULES.items() for name in names.split()}


def test_a_whole_engine_passes_without_a_word(said):
    internals.check_modules()
    internals.check_engine(whole_engine())
    assert not said


@pytest.mark.parametrize(
    ("part", "name"),
    [("", "micro_batches"), ("", "pipe_buffers"), ("grid", "stage_to_global"), ("module", "loss_fn")],
)
def test_what_an_engine_lacks_is_named_before_it_is_watched(said, part, name):
    engine = whole_engine()
    delattr(getattr(engine, part) if part else type(engine), name)
    where = ".".join(word for word in ("PipelineEngine", part, name) if word)
    lacking = rf"version {deepspeed.__version__} does not have: {where}\. .*Install one of these"
    with pytest.raises(ValueError, match=lacking) as error:
        access.check_supported(engine)
    assert f"tested are {internals.OLDEST} to {internals.NEWEST}" in str(error.value)


def test_a_method_that_has_moved_is_named(said, monkeypatch):
    engine = whole_engine()
    internals.check_engine(engine)
    monkeypatch.delattr(PipelineEngine, "_exec_schedule")
    with pytest.raises(ValueError, match=r"PipelineEngine\._exec_schedule\."):
        internals.check_engine(engine)


def test_an_instruction_that_is_not_run_any_more_is_named(said):
    engine = whole_engine()
    del engine._INSTRUCTION_MAP[schedule.SendGrad]
    with pytest.raises(ValueError, match=r"does not have: PipelineEngine\._INSTRUCTION_MAP\[SendGrad\]\."):
        internals.check_engine(engine)


@pytest.mark.parametrize("kind", internals._OPTIMIZERS)
def test_an_optimizer_that_keeps_gradients_elsewhere_is_named(said, kind):
    """Who looked for them where they were would leave nothing out, in silence."""
    engine, names = whole_engine(), internals._OPTIMIZERS[kind].split()
    known = type(kind, (Whole,), {})
    type(engine).optimizer = known(names)
    internals.check_engine(engine)
    type(engine).optimizer = type("Derived", (known,), {})(names[1:])
    with pytest.raises(ValueError, match=rf"does not have: {kind}\.{names[0]}\."):
        internals.check_engine(engine)


@pytest.mark.parametrize("path", ["deepspeed.runtime.pipe.p2p", "deepspeed.runtime.fp16.fused_optimizer"])
def test_what_a_module_lacks_is_named(monkeypatch, path):
    name = internals._MODULES[path].split()[0]
    monkeypatch.delattr(f"{path}.{name}")
    with pytest.raises(ImportError, match=rf"does not have: {path}\.{name}\. "):
        internals.check_modules()


def test_a_module_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(internals._MODULES, "deepspeed.runtime.pipe.p2q", "_grid")
    with pytest.raises(ImportError, match=r"does not have: deepspeed\.runtime\.pipe\.p2q\. "):
        internals.check_modules()


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.20.0", True), ("0.19.10+abc1", True), ("1.0", True), ("0.19.8+unknown", False), ("0.16.0", False)],
)
def test_a_version_that_nobody_has_tested_is_pointed_at(said, monkeypatch, version, warned):
    monkeypatch.setattr(internals, "NEWEST", "0.19.8")
    monkeypatch.setattr(deepspeed, "__version__", version)
    internals.check_engine(whole_engine())
    assert [f"DeepSpeed {version} is newer than what this was tested with" in line for line in said] == [True] * warned
