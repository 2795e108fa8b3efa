"""What a step comes to in numbers, and what DeepSpeed's monitors make of them, read back with the real libraries."""

import csv
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from deepspeed.monitor import csv_monitor, tensorboard

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import CULPRIT, blamed

from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.numbers import Numbers, monitor_events
from deepspeed_sentinel.telemetry.who import Who

WHO = Who(np.arange(12).reshape(4, 3), [[Device(f"node-{stage}", 0, name="cpu")] * 3 for stage in range(4)])
RANK_0 = SimpleNamespace(get_rank=lambda: 0)
TOTALS = {
    "steps": 31, "judged_messages": 288, "alarms": 4, "disputes": 2, "skipped_steps": 1, "excluded_column_steps": 3,
}  # fmt: skip


def attacked():
    convicted = np.zeros((4, 3), bool)
    convicted[CULPRIT] = True
    return replace(blamed(), convicted=convicted)


def numbers(**changes):
    return Numbers.of(replace(attacked(), **changes), TOTALS, WHO, 1700000000.5)


def test_numbers_of_a_step():
    of = numbers()
    assert (of.step, of.time, of.action, of.totals) == (30, 1700000000.5, "exclude", TOTALS)
    assert (of.excluded_columns, of.suspects, of.convicted) == (1, 1, (WHO(CULPRIT),))
    assert len(of.scores) == 4 and of.scores[1] == attacked().worker_scores[CULPRIT] > 1.0


def test_a_score_that_is_not_finite_is_drawn_high_and_none_as_nothing():
    scores = np.array([[0.5, np.inf, 0.1], [np.nan, 0.2, 0.1], [1e12, 0, 0], [0, 0, 0]])
    assert numbers(worker_scores=scores).scores == (1e9, 0.2, 1e9, 0.0)


def drawn():
    """Two steps as DeepSpeed's monitor gets them, and the values of each curve."""
    quiet = replace(numbers(), excluded_columns=0, scores=(0.5, 0.25, 0.5, 0.5))
    events = [monitor_events(numbers(), 64), monitor_events(quiet, 128)]
    assert {name for name, *_ in events[0]} == {
        *(f"Sentinel/{name}" for name in ("alarms", "disputes", "skipped_steps", "excluded_column_steps")),
        *(f"Sentinel/{name}" for name in ("excluded_columns", "suspects", "convicted")),
        *(f"Sentinel/score_stage_{stage}" for stage in range(4)),
    }
    wanted = {"alarms": [4, 4], "convicted": [1, 1], "excluded_columns": [1, 0], "score_stage_1": [None, 0.25]}
    wanted["score_stage_1"][0] = numbers().scores[1]
    return events, wanted


def test_csv_files(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_monitor, "dist", RANK_0)
    monitor = csv_monitor.csvMonitor(SimpleNamespace(enabled=True, output_path=str(tmp_path), job_name="job"))
    events, wanted = drawn()
    for of_step in events:
        monitor.write_events(of_step)
    for name, values in wanted.items():
        head, *rows = csv.reader((tmp_path / "job" / f"Sentinel_{name}.csv").open())
        assert head == ["step", name]
        assert [(int(step), float(value)) for step, value in rows] == list(zip((64, 128), values, strict=True))


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install tensorboard to run it: 20 MB, so it is in no requirements")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(tensorboard, "dist", RANK_0)
    monitor = tensorboard.TensorBoardMonitor(SimpleNamespace(enabled=True, output_path=str(tmp_path), job_name="job"))
    events, wanted = drawn()
    for of_step in events:
        monitor.write_events(of_step)
    read = EventAccumulator(str(tmp_path / "job"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {name for name, *_ in events[0]}
    for name, values in wanted.items():
        scalars = read.Scalars(f"Sentinel/{name}")
        assert [one.step for one in scalars] == [64, 128]
        assert [one.value for one in scalars] == pytest.approx(values)
