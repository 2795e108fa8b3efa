"""The page stands alone, holds nothing that a stranger could run, and carries a large mesh; the table is plain text."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")

from deepspeed_sentinel.__main__ import main
from deepspeed_sentinel.telemetry.report import table
from deepspeed_sentinel.telemetry.report.digest import digest
from deepspeed_sentinel.telemetry.report.heat import heat
from deepspeed_sentinel.telemetry.report.page import duration, render
from deepspeed_sentinel.telemetry.report.reading import read_run

HOSTILE = "</script><script>stolen()</script>\"'><img src=x onerror=stolen()>{{ 7 * 7 }}\x1b[31m\u202e"
OUTSIDE = ("src", "href", "srcset", "action", "data", "poster", "background")


def page_of(folder, loss=None):
    run = read_run(folder)
    document = digest(run)
    return render(document, heat(run, document["run"]["first_step"], document["run"]["last_step"]), loss or {})


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.data, self._in = [], [], False

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self._in = tag == "script" and dict(attributes).get("type") == "application/json"

    def handle_data(self, data):
        if self._in:
            self.data.append(data)
            self._in = False


def tags_of(page):
    tags = Tags()
    tags.feed(page)
    return tags


@pytest.fixture
def hostile(recorded):
    """A run whose hosts, statistics, devices and settings have a name that means harm."""
    folder = recorded()
    path = folder / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        for place in event["who"]:
            place.update(host=HOSTILE, device=HOSTILE, gpu=HOSTILE)
        event |= {name: HOSTILE for name in ("statistic", "why") if name in event}
    events[0]["config"] = {HOSTILE: HOSTILE}
    events.append({**events[-1], "kind": "halt", "reason": HOSTILE})
    path.write_text("\n".join(map(json.dumps, events)))
    ledger = json.loads((folder / "ledger.json").read_text())
    counts = {"proofs": 1, "steps": 1, "alarmed_steps": 1}
    ledger["devices"] = {HOSTILE: {"total": counts, "places": [{"host": HOSTILE, "slot": HOSTILE}]}}
    (folder / "ledger.json").write_text(json.dumps(ledger))
    return folder


def test_the_page_loads_nothing_from_anywhere(recorded):
    page = page_of(recorded(), {"": [[0, 4.0], [1, 3.0]]})
    assert re.findall(r"https?://|//[a-z]|@import|url\(", page) == []
    assert [tag for tag, attributes in tags_of(page).seen if set(attributes) & set(OUTSIDE)] == []
    assert "default-src 'none'" in page


def test_the_page_says_what_the_document_says(recorded):
    page = page_of(recorded())
    assert "1 worker convicted: node-03, cuda:3, slot 3" in page
    assert (
        "deepspeed --hostfile=hosts.left --include=node-0:0,1,2@node-1:0,1@node-2:0,1,2 ..." in page
        and "Start 8 processes (4 stages x 2 replicas)" in page
        and "energy (mean square of all values) = " in page
        and "sbatch --exclude=node-03" in page
    )
    assert "Devices over all runs" in page and "&#34;action&#34;: &#34;quarantine&#34;" in page


def test_nothing_in_the_files_becomes_a_tag(recorded, hostile):
    before = [tag for tag, _ in tags_of(page_of(recorded(name="other"))).seen]
    tags = tags_of(page_of(hostile))
    assert [one for one in tags.seen if one[0] == "img" or "onerror" in one[1]] == []
    assert [tag for tag, _ in tags.seen].count("script") == before.count("script") == 2
    assert "stolen" in "".join(json.loads(tags.data[0])["names"].values()), "the data came through as text"
    assert "{{ 7 * 7 }}" in page_of(hostile)


def test_a_terminal_gets_nothing_that_it_would_act_on(hostile, capsys):
    assert main(["report", str(hostile)]) == 0
    said = capsys.readouterr().out
    assert "stolen" in said and not set(said) & {"\x1b", "\u202e", "\x07"}


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_terminal_breaks_no_word_and_no_line_to_paste(recorded, capsys, monkeypatch, width, rich):
    monkeypatch.setenv("COLUMNS", str(width))
    if not rich:
        monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    folder = recorded()
    (folder / "exclude.json").write_text(json.dumps({"deepspeed": f"--exclude={'@'.join(['node-03:3'] * 20)}"}))
    assert main(["report", str(folder)]) == 0
    said, document = capsys.readouterr().out, digest(read_run(folder))
    told = [*document["sentences"], *document["todo"]["advice"]]
    told += [text for state, worker, found in table.rows_of(document) for text in (state, worker, *found)]
    words = set(re.sub("[;│]", " ", said).split())
    assert set(re.sub("[;]", " ", " ".join(told)).split()) <= words
    (pasted,) = [line["text"] for line in document["todo"]["lines"]]
    lines = said.splitlines()
    assert f"    {pasted}" in lines, "whole, however long"
    if rich:
        assert max(len(line) for line in lines if pasted not in line) <= width


def test_a_hosts_long_name_loses_its_domain_in_the_table_alone(recorded, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder, host = recorded(), "ip-10-0-113-23.eu-west-1.compute.internal"
    events = (folder / "events.jsonl").read_text().replace('"node-03"', f'"{host}"')
    (folder / "events.jsonl").write_text(events)
    assert main(["report", str(folder)]) == 0
    before, in_table = capsys.readouterr().out.split("Workers that something was found of")
    assert host in before and "ip-10-0-113-23…," in in_table and "internal" not in in_table


def test_the_table_says_what_a_statistic_means_and_where_the_fence_is(recorded, capsys):
    assert main(["report", str(recorded())]) == 0
    said = " ".join(re.sub("[│┃]", " ", capsys.readouterr().out).split())
    assert "energy (mean" in said and "(1 is on" in said


def test_the_table_is_there_without_rich_too(recorded, capsys, monkeypatch):
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    assert main(["report", str(recorded())]) == 0
    said = capsys.readouterr().out
    assert "convicted | stage 1, replica 2 (rank 5, node-03, cuda:3, GPU-1a2b3c4d) | " in said
    assert "--include=node-0:0,1,2@node-1:0,1@node-2:0,1,2 ..." in said
    assert "Start 8 processes (4 stages x 2 replicas)" in said


def test_json_is_all_of_it_and_strict(recorded, capsys):
    folder = recorded()
    assert main(["report", str(folder), "--json"]) == 0

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert document == json.loads(json.dumps(digest(read_run(folder))))
    assert {"sentences", "workers", "timeline", "disputes", "deals", "cost", "todo", "settings", "notes"} <= set(
        document
    )


def test_the_page_is_written_where_asked_with_the_loss(recorded, tmp_path, capsys):
    folder, out = recorded(), tmp_path / "deep" / "report.html"
    (tmp_path / "loss.csv").write_text("step,loss\n0,4.25\n1,4.0\n")
    assert main(["report", str(folder), "--html", str(out), "--loss", str(tmp_path / "loss.csv")]) == 0
    assert f"Written to {out}" in capsys.readouterr().err
    assert json.loads(tags_of(out.read_text()).data[0])["loss"] == [["", [[0, 4.25], [1, 4.0]]]]


def test_without_jinja2_the_error_says_how_to_install_it(recorded, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(recorded()), "--html", str(tmp_path / "a.html")]) == 1
    assert 'pip install ".[report]"' in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [(["nowhere"], 1, "output_dir"), (["nowhere", "--samples-a-step", "0"], 2, "must be 1 or more, got 0")],
)
def test_errors_say_what_to_do(arguments, status, said, capsys):
    assert main(["report", *arguments]) == status
    assert said in capsys.readouterr().err


def test_a_report_needs_neither_torch_nor_deepspeed(recorded, tmp_path):
    code = (
        "import sys\nfrom deepspeed_sentinel.__main__ import main\n"
        f"assert main(['report', {str(recorded())!r}, '--html', {str(tmp_path / 'a.html')!r}]) == 0\n"
        "print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_large_mesh_over_thousands_of_steps_stays_small(tmp_path):
    stages, replicas, steps = 22, 8, 2000
    head = {"schema_version": 1, "run_id": "a", "time": 17e8, "who": []}
    mesh = {"stages": stages, "replicas": replicas}
    start = {**head, "kind": "start", "step": 0, "mesh": mesh, "config": {}, "injecting": False}
    score = json.dumps([[0.4321] * replicas] * stages)
    line = json.dumps({**head, "kind": "step", "step": -1, "scores": -2, "excluded": [], "warming_up": False})
    lines = (line.replace("-1", str(step)).replace("-2", score) for step in range(steps))
    (tmp_path / "events.jsonl").write_text("\n".join([json.dumps(start), *lines]))
    assert len(page_of(tmp_path)) < 1_500_000


def test_durations_are_in_the_unit_that_people_use():
    assert [duration(seconds) for seconds in (1.96, 119, 120, 7200, 200_000)] == [
        "2.0 s", "119.0 s", "2.0 minutes", "2.0 hours", "2.3 days",
    ]  # fmt: skip
