"""Time per training step with Sentinel attached over without, in one run, for several hidden sizes.

    python benchmarks/engine_overhead.py --hidden 256 512 1024 --out benchmarks/results/engine_overhead.json

Blocks of watched and unwatched steps alternate within one engine, so that whatever else the machine does hits both
alike. The first step of a block is not timed: attaching allocates buffers. Sizes are of a Llama over real text. With
two stages there are no pairs to compare and nothing to keep for audits; four have both. The processors' seconds of all
workers together stand beside: where workers share cores, the wall clock is mostly their waiting for each other.

Then ``--twin-steps`` watched steps, one in two a twin step at random: its time over that of the others among them; and
the seconds of a comparison of the replicas' weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers in all")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--sequence", type=int, default=256, help="tokens a sample")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="pairs of blocks")
    parser.add_argument("--block", type=int, default=4, help="timed steps a block")
    parser.add_argument("--twin-steps", type=int, default=0, help="steps of which one in two is a twin step")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine_overhead.json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def launch(arguments: argparse.Namespace) -> int:
    """Start this file again under torchrun, one process a worker."""
    environment = dict(os.environ)
    import torch

    if not torch.cuda.is_available():
        environment.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--master_port", str(port)),
        *(
            "--nproc_per_node",
            str(arguments.stages * arguments.replicas),
            __file__,
            "--worker",
            *sys.argv[1:],
        ),
    ]
    return subprocess.run(command, env=environment, check=False).returncode


def with_twins(engine: Any, data: Iterator[Any], steps: int) -> dict[str, Any]:
    """Seconds of twin steps, of the steps between, and of comparisons of weights."""
    import torch

    import deepspeed_sentinel

    block = {"events": "none", "twins": {"every": 2}, "weights_every": 0, "seed": 1}
    handle = deepspeed_sentinel.attach(engine, block)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    compared = []
    for index in range(steps + 1):
        torch.distributed.barrier()
        begin = time.perf_counter()
        float(engine.train_batch(data))
        middle = time.perf_counter()
        torch.distributed.barrier()
        handle.comparison.compare()
        if index:
            seconds[handle.last_verdict.twins].append(middle - begin)
            compared.append(time.perf_counter() - middle)
    handle.detach()
    twin, other = (statistics.median(seconds[kind]) for kind in (True, False))
    return {
        "twin_step_seconds_median": twin,
        "other_step_seconds_median": other,
        "twin_steps": len(seconds[True]),
        "ratio_of_twin_steps": twin / other,
        "comparison_of_weights_seconds_median": statistics.median(compared),
        "weights_a_worker": sum(weight.numel() for weight in engine.module.parameters()),
    }


def work(arguments: argparse.Namespace) -> None:
    import deepspeed
    import torch

    import deepspeed_sentinel
    from deepspeed_sentinel import corpus
    from deepspeed_sentinel.demo import model
    from deepspeed_sentinel.demo.options import DemoOptions

    cuda = torch.cuda.is_available()
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    rank = torch.distributed.get_rank()
    text = b"".join(path.read_bytes() for path in corpus.source_files()[:20])
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    results = []
    for hidden in arguments.hidden:
        options = DemoOptions(
            stages=arguments.stages,
            replicas=arguments.replicas,
            layers=arguments.layers,
            hidden=hidden,
            intermediate=hidden * 8 // 3,
            heads=hidden // 64,
            key_value_heads=hidden // 64,
            sequence=arguments.sequence,
            micro_batch_size=arguments.micro_batch_size,
            micro_batches=arguments.micro_batches,
            steps=2,
            start_step=0,
        )
        module = model.build(options)
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW(module.parameters(), lr=1e-4),
            config={
                "train_micro_batch_size_per_gpu": options.micro_batch_size,
                "gradient_accumulation_steps": options.micro_batches,
                "steps_per_print": 10**9,
            },
        )

        generator = torch.Generator().manual_seed(engine.grid.get_data_parallel_id())

        def batches(generator: torch.Generator = generator):
            while True:
                starts = torch.randint(
                    len(tokens) - arguments.sequence - 1, (arguments.micro_batch_size,), generator=generator
                ).tolist()
                rows = torch.stack([tokens[start : start + arguments.sequence + 1] for start in starts]).long()
                yield rows[:, :-1], rows[:, 1:]

        data = batches()
        seconds: dict[bool, list[float]] = {True: [], False: []}
        processor: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(arguments.rounds):
            for watched in (False, True):
                handle = deepspeed_sentinel.attach(engine, {"events": "none"}) if watched else None
                for index in range(arguments.block + 1):
                    torch.distributed.barrier()
                    begin, begin_processor = time.perf_counter(), time.process_time()
                    float(engine.train_batch(data))
                    if index:
                        seconds[watched].append(time.perf_counter() - begin)
                        processor[watched].append(time.process_time() - begin_processor)
                if handle is not None:
                    handle.detach()
        of_all = {}
        for watched, of_rank in processor.items():
            total = torch.tensor(of_rank, dtype=torch.float64, device=engine.device)
            torch.distributed.all_reduce(total)
            of_all[watched] = statistics.median(total.tolist())
        plain, watched_median = statistics.median(seconds[False]), statistics.median(seconds[True])
        results.append(
            {
                "hidden": hidden,
                "tokens_per_micro_batch": options.micro_batch_size * options.sequence,
                "plain_seconds_median": plain,
                "watched_seconds_median": watched_median,
                "ratio": watched_median / plain,
                "ratio_of_minima": min(seconds[True]) / min(seconds[False]),
                "plain_processor_seconds_median": of_all[False],
                "watched_processor_seconds_median": of_all[True],
                "ratio_of_processor_seconds": of_all[True] / of_all[False],
                "timed_steps_each": len(seconds[True]),
            }
        )
        if arguments.twin_steps:
            results[-1].update(with_twins(engine, data, arguments.twin_steps))
        if rank == 0:
            print(
                f"hidden {hidden}: {plain:.3f} s plain, {watched_median:.3f} s watched: {results[-1]['ratio']:.4f}, "
                f"of the processors' time {results[-1]['ratio_of_processor_seconds']:.4f}"
            )
        engine.destroy()
    if rank == 0:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        document = {
            "what": "seconds per train_batch, Sentinel attached over not attached, no attack",
            "stages": arguments.stages,
            "replicas": arguments.replicas,
            "layers": arguments.layers,
            "micro_batches": arguments.micro_batches,
            "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores ({platform.machine()})",
            "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
            "commit": commit.stdout.strip(),
            "results": results,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    options_given = parse()
    if options_given.worker:
        work(options_given)
    else:
        sys.exit(launch(options_given))
