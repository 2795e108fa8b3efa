"""The demo's one job: a process for each worker of the mesh, which trains the runs one after the other.

Starting the processes costs as much as a run, so all runs share them. Each run builds its model and optimizer
anew from the same seed and reads the same batches in the same order.

    python -m deepspeed_sentinel.demo.worker demo_out/options.json
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from deepspeed_sentinel import attach, corpus, initialize
from deepspeed_sentinel.demo import model
from deepspeed_sentinel.demo.live import MESSAGES
from deepspeed_sentinel.demo.options import RUNS, DemoOptions
from deepspeed_sentinel.demo.progress import Writer, finite
from deepspeed_sentinel.demo.story import Story


def engine_config(options: DemoOptions) -> dict[str, Any]:
    """The DeepSpeed config of all runs, without a "sentinel" block."""
    return {
        "train_batch_size": options.micro_batch_size * options.micro_batches * options.replicas,
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": options.micro_batches,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }


def build_engine(options: DemoOptions, sentinel: dict[str, Any] | None) -> Any:
    """A fresh engine: plain DeepSpeed where ``sentinel`` is None, else guarded with that block."""
    module = model.build(options)
    optimizer = torch.optim.AdamW(module.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = options.learning_rate_warmup
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    config = engine_config(options)
    arguments: dict[str, Any] = {"model": module, "optimizer": optimizer, "lr_scheduler": scheduler}
    if sentinel is None:
        engine, *_ = deepspeed.initialize(config=config, **arguments)
    else:
        engine, *_ = initialize(config={**config, "sentinel": sentinel}, **arguments)
    return engine


class Trainer:
    """Trains and evaluates on this process's share of the text."""

    def __init__(self, options: DemoOptions, report: Writer) -> None:
        self.options = options
        self.report = report
        self.train_tokens = corpus.load(options.corpus_folder, options.tokenizer, "train")
        self.held_out_tokens = corpus.load(options.corpus_folder, options.tokenizer, "held_out")

    def data(self, engine: Any, held_out: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The replica's micro-batches from the beginning."""
        options = self.options
        return corpus.batches(
            self.held_out_tokens if held_out else self.train_tokens,
            seed=options.seed,
            replica=engine.grid.get_data_parallel_id(),
            size=options.micro_batch_size,
            sequence=options.sequence,
        )

    def step(self, engine: Any, data: Iterator[Any]) -> tuple[float, float]:
        """(training loss, seconds) of one step; reading the loss back waits for the device."""
        begin = time.perf_counter()
        loss = float(engine.train_batch(data))
        return loss, time.perf_counter() - begin

    def held_out_loss(self, engine: Any) -> float:
        """Loss on the same held-out micro-batches in every run: of a plain engine, in which nobody tampers."""
        count = self.options.eval_micro_batches
        return float(engine.eval_batch(self.data(engine, held_out=True), num_micro_batches=count))

    def run(self, name: str) -> None:
        """One whole run: "clean", "attacked" or "guarded"."""
        self.report("run_start", run=name)
        self.report("message", text=MESSAGES[name].format(start=self.options.start_step))
        engine = build_engine(self.options, None if name == "clean" else self.options.sentinel_block(name))
        data, story = self.data(engine, held_out=False), Story()
        for step in range(self.options.steps):
            loss, seconds = self.step(engine, data)
            extra = {"guard": guard_facts(engine.sentinel, story)} if name == "guarded" else {}
            self.report("step", run=name, step=step, loss=finite(loss), seconds=seconds, **extra)
        counts = {}
        if name != "clean":
            counts = dict(engine.sentinel.counts)
            # Attached, it would leave the text of columns with a convicted worker out of the evaluation.
            engine.sentinel.detach()
        self.report("message", text=f"Run {RUNS.index(name) + 1}: measuring the held-out loss")
        self.report("run_end", run=name, final_loss=finite(self.held_out_loss(engine)), counts=counts)
        if name == "clean":
            self.overhead(engine, data)
        engine.destroy()
        del engine
        gc.collect()

    def overhead(self, engine: Any, data: Iterator[Any]) -> None:
        """Time further steps of the clean run in alternating blocks, with Sentinel attached and without.

        Alternating cancels what else happens on the machine. A block's first step is not timed: attaching and
        the first message of each shape allocate.
        """
        self.report("message", text=MESSAGES["overhead"])
        for _ in range(self.options.overhead_rounds):
            for guarded in (True, False):
                handle = attach(engine, self.options.sentinel_block("overhead")) if guarded else None
                for index in range(self.options.overhead_block + 1):
                    _, seconds = self.step(engine, data)
                    if index:
                        self.report("overhead", guarded=guarded, seconds=seconds)
                if handle is not None:
                    handle.detach()


def guard_facts(sentinel: Any, story: Story) -> dict[str, Any]:
    """What the terminal shows of the step, as plain data; "wiring" [S, C] is the one that its messages went by."""
    verdict = sentinel.last_verdict
    if verdict is None:
        return {}
    return {
        "step": int(verdict.step),
        "warming_up": bool(verdict.warming_up),
        "scores": [[finite(score) for score in row] for row in verdict.worker_scores.tolist()],
        "blamed": sorted({(int(one.worker[0]), int(one.worker[1])) for one in verdict.findings}),
        "excluded": [index for index, out in enumerate(verdict.excluded.tolist()) if out],
        "convicted": [
            [stage, replica]
            for stage, row in enumerate(verdict.convicted.tolist())
            for replica, guilty in enumerate(row)
            if guilty
        ],
        "skip": bool(verdict.skip),
        "twins": bool(verdict.twins),
        "wiring": sentinel.gate.columns.wiring.tolist(),
        "told": story.step(verdict, sentinel.gate.columns.wiring),
    }


def main(options_file: str) -> None:
    """Start all processes and wait for them; what fails in one ends them all with its traceback in the log."""
    options = DemoOptions.load(Path(options_file))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked processes have imported everything. A fork cannot take CUDA along, and is sound on Linux alone.
    forks = options.device == "cpu" and sys.platform == "linux"
    if forks:
        gc.freeze()  # or each process copies everything to look for cycles in it
    try:
        start_processes(work, (options, port), nprocs=options.workers, start_method="fork" if forks else "spawn")
    except (ProcessRaisedException, ProcessExitedException) as error:
        # Where this process waited tells nothing, and would stand before what happened.
        sys.exit(str(error))


def work(rank: int, options: DemoOptions, port: int) -> None:
    """One process: train all runs."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        # An all-reduce for inference. To compile it takes a minute, and who is interrupted at it leaves a lock behind
        # that later jobs wait for without end.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if options.device == "cuda" else "gloo", verbose=False)
    report = Writer(options.progress_file, active=torch.distributed.get_rank() == 0)
    trainer = Trainer(options, report)
    for name in RUNS:
        trainer.run(name)
    report("message", text="All runs done")
    report("done")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
