"""One process of the demo's mesh, started by torchrun: trains the runs one after the other.

Starting the processes costs more than a run, so all runs share them. Each run builds its model and optimizer
anew from the same seed and reads the same batches in the same order.

    torchrun ... -m deepspeed_sentinel.demo.worker demo_out/options.json
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.distributed.elastic.multiprocessing.errors import record

from deepspeed_sentinel import corpus
from deepspeed_sentinel.demo import model
from deepspeed_sentinel.demo.options import DemoOptions
from deepspeed_sentinel.demo.progress import Writer, finite

_MESSAGES = {
    "clean": "Run 1: plain DeepSpeed, nobody tampers",
    "overhead": "Measuring overhead: more steps of run 1, Sentinel attached and detached in turn",
    "attacked": "Run 2: one worker tampers, nobody guards",
    "guarded": "Run 3: one worker tampers, Sentinel guards",
}


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
        import deepspeed_sentinel

        engine, *_ = deepspeed_sentinel.initialize(config={**config, "sentinel": sentinel}, **arguments)
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
        """Loss on the same held-out micro-batches in every run."""
        count = self.options.eval_micro_batches
        return float(engine.eval_batch(self.data(engine, held_out=True), num_micro_batches=count))

    def run(self, name: str) -> None:
        """One whole run: "clean", "attacked" or "guarded"."""
        self.report("run_start", run=name)
        self.report("message", text=_MESSAGES[name])
        engine = build_engine(self.options, None if name == "clean" else self.options.sentinel_block(name))
        data = self.data(engine, held_out=False)
        for step in range(self.options.steps):
            loss, seconds = self.step(engine, data)
            extra = {"guard": guard_facts(engine.sentinel)} if name == "guarded" else {}
            self.report("step", run=name, step=step, loss=finite(loss), seconds=seconds, **extra)
        counts = {} if name == "clean" else dict(engine.sentinel.counts)
        self.report("run_end", run=name, final_loss=finite(self.held_out_loss(engine)), counts=counts)
        if name == "clean":
            self.overhead(engine, data)
        else:
            engine.sentinel.detach()
        engine.destroy()
        del engine
        gc.collect()

    def overhead(self, engine: Any, data: Iterator[Any]) -> None:
        """Time further steps of the clean run in alternating blocks, with Sentinel attached and without.

        Alternating cancels what else happens on the machine. A block's first step is not timed: attaching and
        the first message of each shape allocate.
        """
        import deepspeed_sentinel

        self.report("message", text=_MESSAGES["overhead"])
        for _ in range(self.options.overhead_rounds):
            for guarded in (True, False):
                handle = deepspeed_sentinel.attach(engine, self.options.sentinel_block("overhead")) if guarded else None
                for index in range(self.options.overhead_block + 1):
                    _, seconds = self.step(engine, data)
                    if index:
                        self.report("overhead", guarded=guarded, seconds=seconds)
                if handle is not None:
                    handle.detach()


def guard_facts(sentinel: Any) -> dict[str, Any]:
    """What the live view shows of the step's verdict, as plain data."""
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
    }


@record
def main(options_file: str) -> None:
    """Train all runs; what fails ends the job with a traceback in its log."""
    options = DemoOptions.load(Path(options_file))
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="nccl" if options.device == "cuda" else "gloo", verbose=False)
    report = Writer(options.progress_file, active=torch.distributed.get_rank() == 0)
    trainer = Trainer(options, report)
    for name in ("clean", "attacked", "guarded"):
        trainer.run(name)
    report("message", text="All runs done")
    report("done")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
