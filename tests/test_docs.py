"""What people read: links lead somewhere, examples parse, the drawn picture is the one in the repository."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml

from deepspeed_sentinel import __version__
from deepspeed_sentinel.attacks.base import apply_attack, build_attack
from deepspeed_sentinel.attacks.context import AttackContext
from deepspeed_sentinel.compat import tomllib
from deepspeed_sentinel.simulation.cli import summary

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
LANGUAGES = {"bash", "cfg", "ini", "json", "python", "text", "toml", "yaml"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return [(language.strip(), body) for _, language, body in FENCE.findall(page.read_text(encoding="utf-8"))]


def prose(page: Path) -> str:
    """A page without its fenced blocks and what stands between backticks."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def parse(language: str, body: str) -> None:
    if language == "json":  # an entry of an object is shown without the object
        json.loads(body if body.lstrip().startswith(("{", "[")) else f"{{{body}}}", strict=False)
    elif language == "toml":
        tomllib.loads(body)
    elif language == "python":
        ast.parse(body)


def problems_of_links(page: Path) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists():
            found.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(there):
            found.append(f"{target}: no such heading")
    return found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](there.md) [b](there.md#a-heading-twice) [c](#here) `[d](no.md)`\n# Here", None),
        ("[a](gone.md)", "gone.md: no such file"),
        ("[a](there.md#b)", "there.md#b: no such heading"),
        ("```text\n# Here\n```\n[a](#here)", "#here: no such heading"),
    ],
)
def test_the_check_of_links_sees_what_is_broken(tmp_path, text, problem):
    (tmp_path / "there.md").write_text("# A heading, `twice`")
    page = tmp_path / "page.md"
    page.write_text(text)
    assert problems_of_links(page) == ([problem] if problem else [])


@pages
def test_relative_links_lead_somewhere(page):
    assert problems_of_links(page) == []


@pages
def test_fenced_blocks_name_their_language_and_parse(page):
    for language, body in blocks(page):
        assert language in LANGUAGES, f"a block without a language, or with an unknown one: {language!r}\n{body}"
        try:
            parse(language, body)
        except ValueError as error:
            raise AssertionError(f"{language} that does not parse: {error}\n{body}") from error
        except SyntaxError as error:
            raise AssertionError(f"python that does not parse: {error}\n{body}") from error


def test_every_page_of_the_docs_is_linked_from_the_readme():
    linked = re.findall(r"\]\((docs/[\w-]+\.md)[^)]*\)", prose(ROOT / "README.md"))
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} - set(linked) == set()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_picture_is_what_its_script_draws():
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs/picture.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.FILE.read_text(encoding="utf-8") == script.picture()


def drawn(tag: str) -> list[ElementTree.Element]:
    """The elements of docs/judged.svg of one kind."""
    return ElementTree.parse(ROOT / "docs/judged.svg").findall(f"{{http://www.w3.org/2000/svg}}{tag}")


def boxes() -> list[tuple[float, float, float, float, bool]]:
    """(left, top, right, bottom, whether it asks) of each box in the picture but its card."""
    found = [[float(box.get(name, 0)) for name in ("x", "y", "width", "height", "rx")] for box in drawn("rect")]
    return [(x, y, x + width, y + height, round_ > 8) for x, y, width, height, round_ in found if width < 800]


def test_the_picture_is_flat_enough_for_the_readme():
    root = ElementTree.parse(ROOT / "docs/judged.svg").getroot()
    assert float(root.get("width", 0)) == 900 and float(root.get("height", 0)) <= 420


def test_questions_in_the_picture_have_a_yes_and_a_no_and_nothing_else_has():
    root = list(ElementTree.parse(ROOT / "docs/judged.svg").getroot())
    answers: dict[tuple[float, ...], list[str]] = {box: [] for box in boxes() if box[4]}
    assert len(answers) == 3
    for path, after in pairwise(root):
        begins = re.match(r"M ([\d.]+) ([\d.]+) L ", path.get("d", ""))
        words = after.text if after.text in ("yes", "no") else None
        if begins:
            x, y = map(float, begins.groups())
            asked = [box for box in answers if box[0] <= x <= box[2] and box[1] <= y <= box[3]]
            assert bool(asked) == bool(words), f"the arrow from {x}, {y}"
            for box in asked:
                answers[box].append(words or "")
    assert [sorted(one) for one in answers.values()] == [["no", "yes"]] * 3


def test_words_in_the_picture_stay_in_their_boxes():
    pytest.importorskip("matplotlib")
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    told = 0
    for one in drawn("text"):
        x, y, size = (float(one.get(name, 0)) for name in ("x", "y", "font-size"))
        around = [box for box in boxes() if box[0] <= x <= box[2] and box[1] <= y <= box[3]]
        for left, _, right, _, _ in around:
            # The widest of the fonts that the picture names.
            font = FontProperties(family="DejaVu Sans", weight=int(one.get("font-weight", 400)))
            width = TextPath((0, 0), one.text or "", size=size, prop=font).get_extents().width
            assert x - width / 2 > left + 4 and x + width / 2 < right - 4, one.text
            told += 1
    assert told > 20


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__
    assert any("2603.03592" in str(reference) for reference in citation["references"])


def test_the_attack_of_the_page_on_extending_is_one(tmp_path):
    (source,) = (
        body for language, body in blocks(ROOT / "docs/extending.md") if language == "python" and "class" in body
    )
    (tmp_path / "mine.py").write_text(source)
    attack = build_attack(f"{tmp_path}/mine.py:Dimmed", {"share": 0.25})
    where = AttackContext(
        direction="forward", stage=1, replica=2, step=30, micro_batch=0, start=30, generator=torch.Generator()
    )
    tampered = apply_attack(attack, torch.ones(2, 8), where)
    assert tampered.tolist() == [[0.5, 0.5, 1, 1, 1, 1, 1, 1]] * 2


def test_what_the_page_on_extending_shows_of_a_simulation_is_what_the_command_prints():
    shown = [body.splitlines() for language, body in blocks(ROOT / "docs/extending.md") if language == "text"]
    whole: dict[str, Any] = {
        "malicious": [[1, 2]], "convicted": [[1, 2]], "false_convictions": 0, "false_alarms": 0,
        "false_alarm_rate": 0.0, "loss": {}, "seconds": 9.0, "details": {"seconds_a_step": 0.1, "guard": "on"},
    }  # fmt: skip
    unseen = {"convicted": [], "f1": 0.0, "precision": None, "recall": 0.0, "judged_messages": 960,
              "detection_steps_mean": None, "detection_steps_max": None}  # fmt: skip
    proved = {"f1": 1.0, "precision": 1.0, "recall": 1.0, "judged_messages": 912,
              "detection_steps_mean": 1.0, "detection_steps_max": 1}  # fmt: skip
    printed = [summary({**whole, **one}).splitlines() for one in (unseen, proved)]
    assert shown == [lines[: len(of_page)] for lines, of_page in zip(printed, shown, strict=True)]
