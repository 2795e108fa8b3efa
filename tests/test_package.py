"""What is packed: the types, the hook of the flag, and in an sdist everything that the repository has."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "deepspeed_sentinel", "docs", "examples", "integration_tests", "kernels", "tests")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Wheel and sdist, made in a copy: setuptools leaves things behind."""
    folder = tmp_path_factory.mktemp("packed")
    for path in ROOT.iterdir():
        if path.name in FOLDERS:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, folder)
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "sdist"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_has_types_the_flag_the_command_and_the_page(packed):
    with ZipFile(packed[0]) as wheel:
        names = wheel.namelist()
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        told = wheel.read(points).decode()
    assert "[torch.backends]\ndeepspeed_sentinel = deepspeed_sentinel.flag:begin" in told
    assert "[console_scripts]\ndeepspeed-sentinel = deepspeed_sentinel.__main__:main" in told
    assert "deepspeed_sentinel/py.typed" in names
    report = {f"deepspeed_sentinel/telemetry/report/report.{kind}" for kind in ("html.j2", "css", "js")}
    assert report <= set(names), "what the page is made of"
    assert {name.partition("/")[0] for name in names if not name.startswith("deepspeed_sentinel-")} == {
        "deepspeed_sentinel"
    }


def test_the_description_has_no_link_that_an_index_page_breaks(packed):
    with ZipFile(packed[0]) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        text = Parser().parsestr(wheel.read(metadata).decode()).get_payload()
    assert "## Switch it on" in text
    assert re.findall(r"\]\((?!https?://)[^)]*\)", text) == []


def test_the_sdist_has_all_that_the_repository_has(packed):
    with tarfile.open(packed[1]) as sdist:
        packed_files = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(wanted) > 300
    assert wanted - packed_files == set()
    assert {"LICENSE", "Makefile", "README.md", "pyproject.toml", "requirements-dev.txt"} <= packed_files
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"} <= packed_files
