"""What Prometheus reads, with its own parser; where it is served and written, and when no more."""

import importlib.util
import re
import socket
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.telemetry.numbers import Numbers
from deepspeed_sentinel.telemetry.prometheus import Exporter
from deepspeed_sentinel.telemetry.who import Place

DOCS = Path(__file__).parents[2] / "docs" / "monitoring.md"
TOTALS = {
    "steps": 31, "judged_messages": 288, "alarms": 4, "disputes": 2, "skipped_steps": 1, "excluded_column_steps": 3,
}  # fmt: skip
ON_GPU = Place(1, 2, 5, 3, "node-03", "cuda:3", "GPU-1a2b3c4d-64d7-4f0a-a1c9-b2570c9d8e44")
UNKNOWN = Place(2, 0, 6, None, None, None, None)
NUMBERS = Numbers(30, 1700000000.5, "quarantine", TOTALS, 1, 2, (ON_GPU, UNKNOWN), (0.5, 121.25, 0.0, 0.75))
LABELS = {"run_id": "8ac8c698220e125d", "stages": "4", "replicas": "3"}


def config(**block):
    return SentinelConfig.parse({"enabled": True, "prometheus": block}).prometheus


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parsed(text):
    """Every sample: name and labels -> value."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples, name, **labels):
    return samples[("deepspeed_sentinel_" + name, *sorted(labels.items()))]


@pytest.fixture
def textfile(tmp_path):
    return tmp_path / "sentinel.prom"


def test_it_is_served_where_configured_until_it_is_closed():
    port = free_port()
    exporter = Exporter(config(port=port), LABELS)
    exporter.show(NUMBERS)
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        samples = parsed(answer.read().decode())
    assert value(samples, "alarms_total") == 4 and value(samples, "excluded_column_steps_total") == 3
    assert value(samples, "convicted_workers") == 2 and value(samples, "last_step") == 30
    assert value(samples, "last_step_timestamp_seconds") == 1700000000.5
    assert [value(samples, "score", stage=str(stage)) for stage in range(4)] == [0.5, 121.25, 0.0, 0.75]
    assert value(samples, "run_info", **LABELS, action="quarantine") == 1
    place = {"stage": "1", "replica": "2", "rank": "5", "local_rank": "3", "host": "node-03", "device": "cuda:3"}
    assert value(samples, "convicted_worker_info", **place, gpu=ON_GPU.gpu) == 1
    unknown = {"stage": "2", "replica": "0", "rank": "6", "local_rank": "", "host": "", "device": "", "gpu": ""}
    assert value(samples, "convicted_worker_info", **unknown) == 1
    exporter.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=10)
    Exporter(config(port=port), LABELS).close()  # the port is free again


def test_two_exporters_of_a_process_have_nothing_in_common(tmp_path):
    for name, shown in (("a", NUMBERS), ("b", replace(NUMBERS, convicted=()))):
        exporter = Exporter(config(textfile=str(tmp_path / f"{name}.prom")), LABELS)
        exporter.show(shown)
        exporter.close()
    texts = [(tmp_path / f"{name}.prom").read_text() for name in "ab"]
    assert [value(parsed(text), "convicted_workers") for text in texts] == [2, 0]
    assert all("python_info" not in text for text in texts), "what the default registry holds"


def test_before_the_first_step_there_is_nothing_to_read(textfile):
    exporter = Exporter(config(textfile=str(textfile)), LABELS)
    assert textfile.read_text() == ""
    exporter.close()


def test_the_file_is_whole_at_any_time_and_written_once_a_second(textfile):
    now = [100.0]
    exporter = Exporter(config(textfile=str(textfile)), LABELS, clock=lambda: now[0])
    held = textfile.open()  # as a reader has it that began before
    for seconds, step, shown in ((0.5, 1, None), (0.6, 2, 2), (0.5, 3, 2), (0.6, 4, 4)):
        now[0] += seconds
        exporter.show(replace(NUMBERS, step=step))
        samples = parsed(textfile.read_text())
        assert (value(samples, "last_step") if samples else None) == shown
    exporter.show(replace(NUMBERS, step=5))
    exporter.close()
    assert value(parsed(textfile.read_text()), "last_step") == 5, "the last step is never left out"
    assert held.read() == "" and list(textfile.parent.iterdir()) == [textfile], "another file took its place"
    held.close()


def test_what_cannot_be_opened_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1, port {port}: .*in use"):
            Exporter(config(port=port), LABELS)
    with pytest.raises(OSError, match=r"cannot write .*/nowhere/a\.prom: "):
        Exporter(config(textfile=str(tmp_path / "nowhere" / "a.prom")), LABELS)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"port": 0}, ["sentinel.prometheus.port", "0", "greater than or equal to 1"]),
        ({"port": 70000}, ["sentinel.prometheus.port", "70000", "65535"]),
        ({"textfile": "sentinel.txt"}, ["sentinel.prometheus.textfile", '"sentinel.txt"', r"\.prom$"]),
        ({"host": "0.0.0.0"}, ["sentinel.prometheus.host", "unknown key"]),
    ],
)
def test_mistakes_are_named(block, said):
    with pytest.raises(ValueError) as error:
        config(**block)
    assert all(part in str(error.value) for part in said)


def test_without_the_package_the_config_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not config().wanted and not config(address="0.0.0.0").wanted, "who wants nothing needs nothing"
    for block in ({"port": 9400}, {"textfile": "a.prom"}):
        with pytest.raises(ValueError, match=r"sentinel\.prometheus: .*pip install '\.\[prometheus\]'"):
            config(**block)


def test_the_docs_list_every_metric_with_its_type_and_help(textfile):
    exporter = Exporter(config(textfile=str(textfile)), LABELS)
    exporter.show(NUMBERS)
    exporter.close()
    rows = []
    for family in text_string_to_metric_families(textfile.read_text()):
        suffix = "_total" if family.type == "counter" else ""
        labels = ", ".join(f"`{label}`" for label in family.samples[0].labels)
        rows.append(f"| `{family.name}{suffix}` | {family.type} | {labels} | {family.documentation} |")
    listed = re.findall(r"^\| `deepspeed_sentinel_.*$", DOCS.read_text(), re.MULTILINE)
    assert listed == rows, "\n".join(rows)
