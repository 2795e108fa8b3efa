"""A hook for scenarios: asks for other actions on the way, and writes down what a profiler and Prometheus see of it."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

# What is in effect in each step: what is asked for before step 2 and in the file before step 4 is told in these.
ACTIONS = ("exclude", "exclude", "exclude", "observe", "observe", "exclude", "exclude")
STEPS = len(ACTIONS)
_profiler = profile(activities=[ProfilerActivity.CPU])


def ask(engine: Any, step: int) -> None:
    """Before each step, on each rank."""
    sentinel, rank = engine.sentinel, dist.get_rank()
    assert sentinel.action == ACTIONS[step], (step, sentinel.action)
    of_messages = (sentinel.comparison.lenient, sentinel._interception.lenient, sentinel._collector.probe.lenient)
    lenient = (*of_messages, not sentinel._liveness.ends, not sentinel._twins._config.tries_suspects)
    assert set(lenient) == {ACTIONS[step] == "observe"}, (step, lenient)
    if step == 2:
        wanted = {0: "observe", 2: "halt", 5: "halt"}.get(rank)
        if wanted:
            sentinel.action = wanted
        assert sentinel.action == ACTIONS[step], "it takes effect on all ranks at once"
    if rank != 0:
        return
    folder = Path(sentinel.config.output_dir)
    if step == 1:
        _profiler.__enter__()
    if step == 2:
        _profiler.__exit__(None, None, None)
        seen = {event.key: event.count for event in _profiler.key_averages() if event.key.startswith("sentinel::")}
        (folder / "spans.json").write_text(json.dumps(seen))
    if step == 4:
        (folder / "control.json.new").write_text('{"action": "exclude"}')
        os.replace(folder / "control.json.new", folder / "control.json")
    if step == STEPS - 1:
        url = f"http://127.0.0.1:{sentinel.config.prometheus.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            (folder / "metrics.txt").write_bytes(answer.read())
