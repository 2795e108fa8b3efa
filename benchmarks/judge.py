"""What judging one step costs on the host, over the number of workers and of micro-batches.

    python benchmarks/judge.py --out benchmarks/results/judge.json

Evidence is made up (lognormal, laid out in memory as ``evidence/exchange.py`` does), the window of the fences is filled
first, and only ``Judge.step`` is timed, by the processor's time: no process, no device. Clean steps come first, those
of the warm-up on their own, then steps in which one worker of each middle stage tampers, each in a column of its own as
far as there are as many. The last column is nanoseconds for each message judged in a clean step: constant where the
cost is linear. In a run it costs more: there is other work between two steps, and the code is no longer in the caches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import HARD, NAMES, OF_PAIR
from deepspeed_sentinel.judgement.judge import Judge, JudgeSettings
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh

SIZES = (
    *((3, 3, 2), (4, 2, 4), (4, 4, 4), (8, 8, 16), (16, 8, 16), (22, 8, 32)),
    *((16, 16, 16), (32, 16, 16), (64, 16, 16), (64, 16, 32), (64, 64, 32)),
)
ENERGY = NAMES.index("energy")
ATTACKED = 5  # steps


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each size")
    parser.add_argument("--fill", type=int, default=64, help="steps before, which fill the fences' window")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/judge.json"))
    return parser.parse_args(argv)


def measure(stages: int, replicas: int, micro_batches: int, fill: int, steps: int) -> dict[str, float | int]:
    """Timings of one size."""
    mesh = Mesh(stages, replicas)
    config = SentinelConfig()
    settings = {name: getattr(config, name) for name in JudgeSettings.__dataclass_fields__}
    judge = Judge(mesh, JudgeSettings(**{**settings, "seed": 0, "conviction": config.convicts_by(mesh)}))
    generator = np.random.default_rng(0)
    shape = (2, mesh.links, replicas, micro_batches, len(NAMES))
    no_pair = (FORWARD, 0), (BACKWARD, -1)
    digests = np.zeros((2, *shape[:-1], 1), np.int64)
    warm_up, clean, attacked = [], [], []
    for step in range(fill + steps + ATTACKED):
        # All statistics between 0 and 1, which every unit of comparison takes.
        values = (0.5 * np.exp(0.05 * generator.standard_normal(shape))).astype(np.float32)
        values[..., HARD] = 0.0
        for link in no_pair:
            values[link][..., OF_PAIR] = np.nan
        if step >= fill + steps:
            for stage in range(1, stages - 1):
                values[FORWARD, stage, stage % replicas, :, ENERGY] *= 40.0
        by_statistic = np.ascontiguousarray(np.moveaxis(np.stack([values, values]), -1, 1))
        evidence = Evidence(mesh, step, np.moveaxis(by_statistic, 1, -1), digests)
        warming_up = judge.warming_up
        begin = time.process_time()
        judge.step(evidence)
        seconds = time.process_time() - begin
        if warming_up:
            warm_up.append(1e3 * seconds)
        elif step >= fill:
            (clean if step < fill + steps else attacked).append(1e3 * seconds)
    messages = 2 * mesh.links * replicas * micro_batches
    return {
        "workers": stages * replicas,
        "stages": stages,
        "replicas": replicas,
        "micro_batches": micro_batches,
        "messages": messages,
        "milliseconds_median": statistics.median(clean),
        "milliseconds_minimum": min(clean),
        "milliseconds_attacked_median": statistics.median(attacked),
        "milliseconds_warm_up_median": statistics.median(warm_up),
        "nanoseconds_a_message": 1e6 * min(clean) / messages,
    }


def main(arguments: argparse.Namespace) -> None:
    results = []
    for size in SIZES:
        results.append(measure(*size, arguments.fill, arguments.steps))
        shown = results[-1]
        print(
            f"{shown['workers']:5} workers x {shown['micro_batches']:2} micro-batches: "
            f"{shown['milliseconds_median']:7.2f} ms a step (least {shown['milliseconds_minimum']:.2f}, "
            f"attacked {shown['milliseconds_attacked_median']:.2f}, "
            f"warm-up {shown['milliseconds_warm_up_median']:.2f}), "
            f"{shown['nanoseconds_a_message']:.0f} ns a message"
        )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    document = {
        "what": "CPU time of Judge.step, fences' window full; attacked is one worker of each middle stage",
        "statistics": len(NAMES),
        "host": f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} when done",
        "numpy": np.__version__,
        "commit": commit.stdout.strip(),
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse())
