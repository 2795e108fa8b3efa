"""Versions agree: what setup.py allows, what is pinned, and what the package says of itself."""

from __future__ import annotations

import re
from pathlib import Path

import deepspeed
import pytest

from deepspeed_sentinel.engine import internals

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("deepspeed", "numpy", "pydantic", "transformers", "accelerate", "tokenizers", "safetensors", "peft")


def pins(name):
    """Package -> version of a requirements file."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))


def lower_bounds():
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8")))


def test_the_range_of_deepspeed_that_is_told_is_the_one_that_is_tested():
    assert pins("requirements-oldest.txt")["deepspeed"] == internals.OLDEST
    assert pins("requirements.txt")["deepspeed"] == internals.NEWEST
    assert deepspeed.__version__.partition("+")[0] in (internals.OLDEST, internals.NEWEST)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_lower_bound_is_what_is_run(package):
    assert lower_bounds()[package] == pins("requirements-oldest.txt")[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_of_versions_names_what_is_pinned(package):
    page, oldest = (ROOT / "docs/versions.md").read_text(encoding="utf-8"), pins("requirements-oldest.txt")[package]
    newest = {**pins("requirements.txt"), **pins("requirements-dev.txt")}[package]
    called = {"deepspeed": "DeepSpeed", "peft": "PEFT"}.get(package, package)
    assert f"| {called} | {oldest} and later | {newest} | {oldest} |" in page
