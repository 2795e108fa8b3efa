"""A guarded run of two stages in which something happens to rank 1, as the first argument says; see test_lifecycle.py.

    lifecycle.py MODE FOLDER

``restart`` is guarded by the flag alone, fails once inside ``train_batch``, and goes on from its checkpoint when
torchrun starts it anew. ``stopped`` waits at step 3 for a signal. ``dead`` dies at step 3, and no wait of rank 0 ever
raises, as under NCCL. ``stuck`` never comes back from a forward pass. ``slow`` takes its time for data, between two
steps and in an evaluation. ``observe`` never comes back either, for longer than patience lasts, and then does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import p2p

import deepspeed_sentinel
from integration_tests.models import build_model, micro_batches
from integration_tests.scenario import Scenario

SMALL = Scenario(name="lifecycle", micro_batches=2)
STEPS, WHEN, SECONDS = 6, 3, 6.0
PATIENCE = {"stuck": 8.0, "observe": 8.0}


def join(attempt: str) -> None:
    """Torch's own keys outlive an attempt too (pytorch issue 135712), so each attempt has its part of the store."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.PrefixStore(f"attempt_{attempt}", store), rank=rank, world_size=size)


def never_raises(wait: Callable[..., Any]) -> Callable[..., Any]:
    def instead(*args: Any, **kwargs: Any) -> Any:
        try:
            return wait(*args, **kwargs)
        except RuntimeError:
            print("hangs", flush=True)
            while True:
                time.sleep(1)

    return instead


def late(data: Iterator[Any]) -> Iterator[Any]:
    time.sleep(SECONDS)
    yield from data


def once(engine: Any, act: Callable[[], None]) -> None:
    """Act before the next forward pass of this rank."""

    def hook(*_: Any) -> None:
        handle.remove()
        act()

    handle = engine.module.register_forward_pre_hook(hook)


def fail() -> None:
    raise ValueError("transient")


def main(mode: str, folder: str) -> None:
    torch.set_num_threads(1)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if mode == "restart":
        join(attempt)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = dist.get_rank()
    module = build_model(SMALL, 2)
    if mode in PATIENCE:
        patience = timedelta(seconds=PATIENCE[mode])
        dist.distributed_c10d._set_pg_timeout(patience, module._grid.get_pipe_parallel_group())
    if mode == "dead":
        p2p.send, p2p.recv = never_raises(p2p.send), never_raises(p2p.recv)
    block = {"enabled": True, "output_dir": f"{folder}/sentinel", "heartbeat_timeout": 5}
    if mode == "observe":
        block["action"] = "observe"
    initialize = deepspeed.initialize if mode == "restart" else deepspeed_sentinel.initialize
    engine, *_ = initialize(
        model=module,
        model_parameters=list(module.parameters()),
        config={**SMALL.deepspeed_config(), "sentinel": block},
    )
    if attempt != "0":
        engine.load_checkpoint(f"{folder}/checkpoints")
        print(f"resumed at step {engine.global_steps}", flush=True)
        time.sleep(2)  # long enough to hear of a failure
    while engine.global_steps < STEPS:
        step = engine.global_steps
        data = iter(list(micro_batches(SMALL, step, 0)))
        if rank == 1 and step == WHEN:
            if mode == "restart" and attempt == "0":
                once(engine, fail)
            if mode == "stopped":
                print("ready", flush=True)
                time.sleep(600)
            if mode == "dead":
                os.kill(os.getpid(), signal.SIGKILL)
            if mode == "stuck":
                once(engine, lambda: time.sleep(600))
            if mode == "observe":
                once(engine, lambda: time.sleep(2 * PATIENCE["observe"]))
            if mode == "slow":
                data = late(data)
        if rank == 1 and step == WHEN + 1 and mode == "slow":
            time.sleep(SECONDS)
        engine.train_batch(data)
        if mode == "restart" and step == 1:
            engine.save_checkpoint(f"{folder}/checkpoints")
        if step == WHEN and mode == "slow":
            if rank == 1:
                once(engine, lambda: time.sleep(SECONDS))
            engine.eval_batch(iter(list(micro_batches(SMALL, step, 0))))
    print("finished", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
