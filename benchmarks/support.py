"""What the benchmarks share: finding the package in a clone, naming the machine, timing."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def find_package() -> None:
    """Make ``deepspeed_sentinel.kernels`` importable from a clone that was not installed (it lies in kernels/)."""
    try:
        importlib.import_module("deepspeed_sentinel.kernels")
    except ModuleNotFoundError:
        sys.path.insert(0, str(ROOT))
        for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed_sentinel"]:
            del sys.modules[name]
        package = importlib.import_module("deepspeed_sentinel")
        package.__path__.append(str(ROOT))


def machine() -> dict[str, Any]:
    """Where a figure comes from."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    found: dict[str, Any] = {
        "versions": versions,
        "commit": commit.stdout.strip() + (" with changes" if changed.stdout.strip() else ""),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        except FileNotFoundError:
            driver = "unknown"
        found["device"] = properties.name
        found["driver"] = driver or "unknown"
        found["runtime"] = torch.version.cuda or torch.version.hip
    else:
        found["device"] = f"CPU, {os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads used"
    return found


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile, in microseconds."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        "median_us": statistics.median(seconds) * 1e6,
        "p10_us": cuts[0] * 1e6,
        "p90_us": cuts[-1] * 1e6,
        "samples": len(seconds),
    }


def device_seconds(calls: Sequence[Callable[[], Any]], samples: int, batch: int) -> list[float]:
    """Seconds a call, each sample the mean over a batch of them; the calls take turns.

    On a GPU events time the batch, and a wait is queued first so that the host's launches are ahead of the device.
    """
    turn = 0
    seconds = []
    for _ in range(len(calls)):
        calls[turn % len(calls)]()
        turn += 1
    for _ in range(samples):
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            torch.cuda._sleep(int(2e6))
            start.record()
            for _ in range(batch):
                calls[turn % len(calls)]()
                turn += 1
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) * 1e-3 / batch)
        else:
            begin = time.perf_counter()
            for _ in range(batch):
                calls[turn % len(calls)]()
                turn += 1
            seconds.append((time.perf_counter() - begin) / batch)
    return seconds


def host_seconds(call: Callable[[], Any], samples: int) -> list[float]:
    """Seconds until a call returns to the host, with an empty queue before it."""
    seconds = []
    for _ in range(samples):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return seconds


def write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
