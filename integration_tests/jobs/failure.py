"""A small guarded training job that goes wrong in the way its first argument says; see test_failure.py.

    failure.py MODE FOLDER [STEPS]

``plain`` trains and saves a checkpoint after step 2. ``resume`` loads it first. ``mismatch`` makes
rank 2 come to another verdict at step 3. ``empty`` hands replica 1 a batch without tokens at step 3. ``halt`` halts
when stage 1 of replica 1 tampers. Rank 3 dies at step 3: in ``loss`` when losses are averaged; in ``leave`` before
the step, and rank 5 ends by an error of its own then. ``twinN``: rank N dies at step 3, when micro-batches are handed
over in a twin step. ``deal``: columns are dealt anew in every step, and rank 3 dies when another wiring takes effect
after step 3. ``dealt``: rank 2 deals another one than the others at step 3. ``full``: as ``halt``, and rank 2
cannot write its part of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from datetime import timedelta

import deepspeed
import torch

import deepspeed_sentinel
from integration_tests.models import build_model
from integration_tests.scenario import Scenario

REPLICAS, TOKENS = 2, 32
SMALL = Scenario(name="failure")
FAULT = {"stage": 1, "replica": 1, "attack": "nan", "start_step": 3}


def disagree(engine) -> None:
    """Rank 2 lets nobody out where the others exclude, and the other way round."""
    judge = engine.sentinel.gate.judge
    honest = judge.step

    def step(*arguments):
        verdict = honest(*arguments)
        return dataclasses.replace(verdict, excluded=~verdict.excluded) if engine.global_steps == 3 else verdict

    if torch.distributed.get_rank() == 2:
        judge.step = step


def deal_otherwise(engine) -> None:
    """Rank 2 deals its stage the other way round."""
    columns = engine.sentinel.gate.columns
    honest = columns.deal

    def deal(step, doubts):
        wiring = honest(step, doubts)
        return wiring[:, ::-1] if step == 3 else wiring

    if torch.distributed.get_rank() == 2:
        columns.deal = deal


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def main(mode: str, folder: str, steps: str = "8") -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=60), verbose=False)
    module = build_model(SMALL, torch.distributed.get_world_size() // REPLICAS)
    block = {"enabled": True, "output_dir": f"{folder}/sentinel", "warmup_steps": 2, "conviction": "statistics"}
    if mode.startswith("twin"):
        block |= {"twins": {"every": 1}}
    if mode.startswith("deal"):
        block |= {"wiring": "shuffle"}
    if mode in ("halt", "full"):
        block |= {"action": "halt", "inject": [FAULT]}
    engine, *_ = deepspeed_sentinel.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_print": 10**9,
            "sentinel": block,
        },
    )
    if mode == "resume":
        path, _ = engine.load_checkpoint(f"{folder}/checkpoints")
        print(f"resumed {path} at step {engine.global_steps}", flush=True)
    if mode == "mismatch":
        disagree(engine)
    if mode == "dealt":
        deal_otherwise(engine)
    replica, rank = engine.grid.get_data_parallel_id(), torch.distributed.get_rank()
    while engine.global_steps < int(steps):
        tokens = 0 if mode == "empty" and engine.global_steps == 3 and replica == 1 else TOKENS
        generator = torch.Generator().manual_seed(10 * engine.global_steps + replica)
        if engine.global_steps == 3:
            if mode == "loss" and rank == 3:
                engine._aggregate_total_loss = die
            if mode == f"twin{rank}":
                engine.sentinel._twins._of_source = die
            if mode == "full" and rank == 2:
                torch.save = full
            if mode == "deal" and rank == 3:
                engine.sentinel._collector.wire = die
            if mode == "leave" and rank == 3:
                die()
            if mode == "leave" and rank == 5:
                raise RuntimeError("my own collective broke")
        rows = torch.randint(256, (2, 2, tokens + 1), generator=generator)
        loss = float(engine.train_batch(iter([(row[:, :-1], row[:, 1:]) for row in rows])))
        print(f"step {engine.global_steps} loss {loss}", flush=True)
        if mode == "plain" and engine.global_steps == 2:
            engine.save_checkpoint(f"{folder}/checkpoints")
    print("finished", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
