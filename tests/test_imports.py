"""Who may import what, by exact module name: import-linter knows external packages by their root only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "deepspeed_sentinel"
FOLDERS = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.kernels": ROOT / "kernels"}


def module_files() -> dict[str, Path]:
    """Dotted name, as installed, to file, for every module of the package."""
    files = {}
    for prefix, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            files[".".join(part for part in parts if part != "__init__")] = path
    return files


def imported(source: str) -> set[str]:
    """Every module that a source may import or reach by attributes; for ``from a import b`` both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))  # torch.distributed.get_rank, with `import torch` alone
    return names


def offences(names: set[str], forbidden: str) -> set[str]:
    return {name for name in names if name == forbidden or name.startswith(f"{forbidden}.")}


def reach(start: str, files: dict[str, Path]) -> set[str]:
    """Modules of the package that the modules below ``start`` import, directly or not, themselves included."""
    found = {name for name in files if name == start or name.startswith(f"{start}.")}
    assert found, f"{start} is gone: correct the rule in this test"
    new = set(found)
    while new:
        new = set().union(*(imported(files[name].read_text()) for name in new)) & files.keys() - found - {PACKAGE}
        found |= new
    return found


@pytest.mark.parametrize("part", ["judgement", "mesh", "attacks"])
@pytest.mark.parametrize("forbidden", ["deepspeed", "torch.distributed"])
def test_parts_that_know_no_engine(part: str, forbidden: str) -> None:
    files = module_files()
    for module in reach(f"{PACKAGE}.{part}", files):
        assert not offences(imported(files[module].read_text()), forbidden), f"{module} knows {forbidden}"


def test_only_the_engine_part_touches_deepspeeds_internals() -> None:
    files = module_files()
    users = {name for name, path in files.items() if offences(imported(path.read_text()), "deepspeed.runtime")}
    assert users, "nothing uses deepspeed.runtime: this test looks at the wrong place"
    assert {name.split(".")[1] for name in users} == {"engine"}


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed",
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "import torch\ndef late():\n    torch.distributed.barrier()",
        "def late():\n    from torch.distributed.tensor import DTensor",
    ],
)
def test_the_rule_sees_every_way_of_importing(source: str) -> None:
    assert offences(imported(source), "torch.distributed")
    assert not offences(imported(source), "torch.dist")


@pytest.mark.parametrize("where", ["elsewhere", "repository"])
def test_kernels_are_found_below_the_package(where: str, tmp_path: Path) -> None:
    code = (
        "import importlib.util, deepspeed_sentinel.kernels as kernels\n"
        "print(kernels.__name__, importlib.util.find_spec('kernels') is None)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path if where == "elsewhere" else ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    # From the repository's root python itself puts the folder kernels/ on the path; elsewhere there is no such name.
    assert done.stdout.split() == ["deepspeed_sentinel.kernels", str(where == "elsewhere")]
