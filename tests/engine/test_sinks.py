"""To whom numbers go, what happens where it cannot, and that nothing is opened on a rank that is not the first."""

import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import World

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine.sinks import Sinks
from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.who import Who

WHO = Who(np.arange(12).reshape(4, 3), [[Device("vm", 0, name="cpu")] * 3] * 4)
COUNTS = dict.fromkeys(("judged_messages", "alarms", "disputes", "skipped_steps", "excluded_column_steps"), 2)


@dataclass
class Monitor:
    enabled: bool = True
    fails: bool = False
    got: list = field(default_factory=list)

    def write_events(self, events):
        if self.fails:
            raise RuntimeError("no space left")
        self.got.extend(events)


@cache
def verdict():
    return World().step()


def sinks(monitor, told=None, problem=None, **prometheus):
    config = SentinelConfig.parse({"enabled": True, "prometheus": prometheus})
    engine = SimpleNamespace(monitor=monitor, global_samples=64)
    control = SimpleNamespace(of_first=lambda text: text if problem is None else problem)
    return Sinks(engine, config, control, WHO, {"run_id": "a"}, (told if told is not None else []).append)


def test_a_monitor_that_is_on_gets_every_step(one_rank):
    monitor = Monitor()
    of = sinks(monitor)
    of.step(verdict(), COUNTS)
    of.step(verdict(), COUNTS)
    assert [event for event in monitor.got if event[0] == "Sentinel/alarms"] == [("Sentinel/alarms", 2, 64)] * 2
    of.close()


def test_one_that_is_off_gets_nothing(one_rank):
    monitor = Monitor(enabled=False)
    sinks(monitor).step(verdict(), COUNTS)
    assert not monitor.got


def test_one_that_fails_ends_nothing_and_is_told_of_once(one_rank, tmp_path):
    told, textfile = [], tmp_path / "a.prom"
    of = sinks(Monitor(fails=True), told, textfile=str(textfile))
    for _ in range(3):
        of.step(verdict(), COUNTS)
    of.close()
    assert told == ["DeepSpeed's monitor gets no numbers of Sentinel any more: no space left"]
    assert "deepspeed_sentinel_steps_total 3.0" in textfile.read_text(), "the other one goes on"


def test_a_file_that_can_no_longer_be_written_ends_nothing(one_rank, tmp_path):
    folder, told = tmp_path / "folder", []
    folder.mkdir()
    of = sinks(Monitor(enabled=False), told, textfile=str(folder / "a.prom"))
    (folder / "a.prom").unlink()
    folder.rmdir()
    of.step(verdict(), COUNTS)
    of.close()
    assert told and all("cannot write" in line and str(folder) in line for line in told)


def test_other_ranks_open_nothing_and_fail_with_the_first(one_rank, monkeypatch, tmp_path):
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monitor, textfile = Monitor(), tmp_path / "a.prom"
    of = sinks(monitor, problem="", textfile=str(textfile))
    of.step(verdict(), COUNTS)
    of.close()
    assert not monitor.got and not textfile.exists()
    with pytest.raises(ValueError, match=r"sentinel\.prometheus: cannot listen .* Name a free port"):
        sinks(monitor, problem="cannot listen on 127.0.0.1, port 9400: in use", port=9400)
