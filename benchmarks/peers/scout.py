"""The same faults on the same small DeepSpeed pipeline: plain, with Sentinel, with SCOUT of lm-resiliency, with both.

    pip install --no-deps lm-resiliency==0.2.0
    python benchmarks/peers/scout.py                                        # one machine
    torchrun --nnodes 2 --nproc_per_node 5 ... benchmarks/peers/scout.py    # several: N processes, N over the stages

One process a worker, and one GPU a worker: SCOUT 0.2.0 waits for CUDA wherever it replays a layer, so without a GPU
this finds out where it ends, writes that, and measures nothing. Install it without its dependencies, or pip may choose
another torch.

Each run starts from the same weights, in the same processes. In a run with a fault, one worker of a middle stage has
it from step ``--start`` on (faults.py). Found: the first step in which a tool reports anything but timing. Named: whom
Sentinel convicts, or which rank SCOUT attributes an "sdc" to. Entered: steps in which what the faulty worker added to
the reduction was not all zeros, and the step was taken. Both tools are used at their defaults, and at their most
watchful: SCOUT checks in every step, Sentinel makes one step in five a twin step. SCOUT is enabled first: enabled after
Sentinel it puts its own entry in the place of Sentinel's for the optimizer's step. Its checkpoints (GEMINI) are off,
and so are its recipes for embedding and output, which it finds on no stage of a pipeline.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import socket
import statistics
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, VERSION = "lm-resiliency", "0.2.0"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks/peers")]

from training import RECIPES, Run, Tools, gathered  # noqa: E402

WATCHFUL = {"twins": {"every": 5}}
TOOLS = {
    "plain": Tools(),
    "sentinel": Tools(sentinel={}),
    "sentinel, watchful": Tools(sentinel=WATCHFUL),
    "scout": Tools(scout=10),
    "scout, watchful": Tools(scout=1),
    "both": Tools(sentinel={}, scout=10),
    "both, watchful": Tools(sentinel=WATCHFUL, scout=1),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=3, help="without torchrun; else its processes over the stages")
    parser.add_argument("--layers", type=int, default=2, help="layers a stage")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--sequence", type=int, default=32, help="tokens a sample")
    parser.add_argument("--steps", type=int, default=80, help="of a run")
    parser.add_argument("--start", type=int, default=33, help="step, from 0, in which a fault begins")
    parser.add_argument("--rounds", type=int, default=2, help="clean runs of all tools, for times and false alarms")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--faults", nargs="*", default=None, help="by default all of faults.py")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    return parser.parse_args()


def launch(arguments: argparse.Namespace) -> int:
    """Start this file again under torchrun, one process a worker."""
    import torch

    environment = dict(os.environ)
    workers = arguments.stages * arguments.replicas
    if torch.cuda.device_count() < workers:
        print(f"{workers} workers, {torch.cuda.device_count()} GPUs: they run on the CPU")
        environment.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--master_port", str(port))
    command = [*torchrun, "--nproc_per_node", str(workers), __file__, *sys.argv[1:]]
    return subprocess.run(command, env=environment, check=False).returncode


def try_scout(arguments: argparse.Namespace, recipes: dict[str, Any]) -> dict[str, Any]:
    """Train without a fault until SCOUT has checked every layer once: what it told, and where it ended on this mesh."""
    ended = None
    run = Run(arguments, Tools(scout=1, recipes=recipes), None)
    try:
        run.train(arguments.layers)
    except Exception as error:
        inside = [one for one in traceback.extract_tb(error.__traceback__) if "lm_resiliency" in one.filename]
        if not inside:
            raise
        last = inside[-1]
        at = f"lm_resiliency{last.filename.rpartition('lm_resiliency')[2]}:{last.lineno}, {last.name}"
        ended = {"error": f"{type(error).__name__}: {error}", "at": at}
    told, steps = [one["what"] for one in run.found], len(run.seconds)
    run.close()
    return {"settings": recipes, "steps": steps, "ended": ended, "told_by_rank": gathered(told)}


def measure(arguments: argparse.Namespace, tools: str, fault: str | None) -> dict[str, Any]:
    from faults import FAULTS

    run = Run(arguments, TOOLS[tools], FAULTS[fault] if fault else None)
    run.train(arguments.steps)
    stage, mine = run.engine.stage_id, run.weights().cpu()
    everyone = gathered((run.found, run.entered, stage, mine))
    of_stage = [weights for _, _, other, weights in everyone if other == stage]
    alike = all(gathered(all(weights.equal(mine) for weights in of_stage)))
    told = sorted((one for found, *_ in everyone for one in found), key=lambda one: one["step"])
    run.close()
    # Each rank of a group of SCOUT's reports the same.
    told = [one for index, one in enumerate(told) if one not in told[:index]]
    counted = fault is not None and FAULTS[fault].in_gradients
    return {
        "tools": tools,
        "fault": fault,
        "told": told,
        "entered": sum(entered for _, entered, *_ in everyone) if counted else None,
        "replicas_alike_at_the_end": alike,
        "seconds": run.seconds[1:],
    }


def summary(arguments: argparse.Namespace, runs: list[dict[str, Any]], culprit: list[int]) -> list[dict[str, Any]]:
    """A row for each tool of each run with a fault, and for each of the clean ones."""
    rows = []
    for run in runs:
        for tool in ("sentinel", "scout"):
            if tool not in run["tools"] and "both" not in run["tools"]:
                continue
            told = [one for one in run["told"] if one["tool"] == tool and one["what"] != ["straggler"]]
            before = [one for one in told if run["fault"] is None or one["step"] < arguments.start]
            after = [one for one in told if one not in before]
            named = [(one["step"], who) for one in after for who in one["named"]]
            rows.append(
                {
                    "tools": run["tools"],
                    "fault": run["fault"],
                    "by": tool,
                    "found_in_step": after[0]["step"] if after else None,
                    "named_in_step": next((step for step, who in named if who == culprit), None),
                    "named_wrongly": sorted({tuple(who) for _, who in named if who != culprit}),
                    "entered": run["entered"],
                    "replicas_alike_at_the_end": run["replicas_alike_at_the_end"],
                    "false_alarms": len(before),
                    "stragglers_told": sum(one["what"] == ["straggler"] for one in run["told"] if one["tool"] == tool),
                }
            )
    return rows


def times(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the clean runs. The mean has what a check in one step of ten costs, the median has not."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if run["fault"] is None:
            found.setdefault(run["tools"], []).extend(run["seconds"])
    plain = found.get("plain")
    return [
        {
            "tools": tools,
            "steps": len(seconds),
            "median_seconds": statistics.median(seconds),
            "mean_seconds": statistics.fmean(seconds),
            "median_over_plain": statistics.median(seconds) / statistics.median(plain) if plain else None,
            "mean_over_plain": statistics.fmean(seconds) / statistics.fmean(plain) if plain else None,
        }
        for tools, seconds in found.items()
    ]


def work(arguments: argparse.Namespace) -> None:
    import deepspeed
    import support
    import torch
    from deepspeed.accelerator import get_accelerator
    from faults import FAULTS

    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    faults = list(FAULTS) if arguments.faults is None else arguments.faults
    culprit = [arguments.stages // 2, size // arguments.stages - 1]
    tries = []
    if any(TOOLS[tools].scout for tools in arguments.tools):
        tries = [try_scout(arguments, recipes) for recipes in ({}, RECIPES)]
    ended = tries[-1]["ended"] if tries else None
    plan = [(tools, None) for _ in range(arguments.rounds) for tools in arguments.tools]
    plan += [(tools, fault) for fault in faults for tools in arguments.tools if tools != "plain"]
    runs = []
    for tools, fault in plan if ended is None else []:
        runs.append(measure(arguments, tools, fault))
        if rank == 0:
            print(f"{tools}, {fault or 'clean'}: {runs[-1]['told'][:2]}", flush=True)
    if rank == 0:
        document = support.machine()
        document["versions"] |= {name: importlib.metadata.version(name) for name in ("deepspeed", PACKAGE)}
        document |= {
            "what": "the same faults with Sentinel and with SCOUT of lm-resiliency",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "mesh": {"stages": arguments.stages, "replicas": size // arguments.stages},
            "layers_per_stage": arguments.layers,
            "hidden": arguments.hidden,
            "tokens": arguments.sequence,
            "steps": arguments.steps,
            "start": arguments.start,
            "culprit": culprit,
            "scout_tried": tries,
            "faults": {name: FAULTS[name].what for name in faults} if runs else {},
            "rows": summary(arguments, runs, culprit),
            "seconds_per_step": times(runs),
        }
        support.write(arguments.out, document)
        if ended:
            print(f"SCOUT ends here, so nothing is measured: {ended['error']} ({ended['at']})")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        sys.exit(
            f"{PACKAGE} is not installed; in an environment of its own: pip install --no-deps {PACKAGE}=={VERSION}"
        )
    if "RANK" in os.environ:
        work(parse())
    else:
        sys.exit(launch(parse()))
