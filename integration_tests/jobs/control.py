"""The control plane alone, without a model: attach, the small collectives of steps, detach.

    control.py STAGES [--liar]

Writes JOB_FOLDER/<rank>.json: seconds to connect and to exchange keys, seconds of a gather, open sockets, and what the
gathers gave. With --liar the second rank alters what it hands on, with --altering what is dealt to its column.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import statistics
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.keys import Keys
from deepspeed_sentinel.evidence.stage_secret import stage_secret
from deepspeed_sentinel.mesh import Worker

GATHERS = 10


def open_sockets() -> int:
    modes = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            modes.append(os.fstat(int(descriptor)).st_mode)
        except OSError:  # of the listing itself
            continue
    return sum(map(stat.S_ISSOCK, modes))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", type=int)
    parser.add_argument("--liar", action="store_true")
    parser.add_argument("--altering", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.new_group([0, 1])  # ranks are in unlike numbers of groups
    before = open_sockets()
    begin = time.monotonic()
    ranks = np.arange(world).reshape(arguments.stages, -1)
    worker = Worker(*divmod(rank, ranks.shape[1]))
    control = Control(ranks)
    connected = time.monotonic()
    keys = Keys.exchange(None, control)
    honest_row = control._broadcast
    if arguments.altering and rank == 1:  # a worker of the first stage hands on something else to its column

        def altered(mine, sender, group, most):  # type: ignore[no-untyped-def]
            return honest_row(mine ^ 1 if sender == worker else mine, sender, group, most)

        control._broadcast = altered  # type: ignore[method-assign]
    refused, of_stage = None, None
    try:
        of_stage = stage_secret(worker, ranks, keys, control, None).number("test")
    except SentinelError as error:
        refused = str(error)
    result = {
        "of_stage": of_stage,
        "refused": refused,
        "connect_seconds": connected - begin,
        "keys_seconds": time.monotonic() - connected,
        "sockets": open_sockets() - before,
        "shared": keys.secret_with((rank + 1) % world).number("test"),
        "right": True,
        "error": None,
    }
    if arguments.liar and rank == 1:
        honest = control._in_row
        control._in_row = lambda mine: honest(mine + (len(mine) > 1))  # type: ignore[method-assign]
    seconds = []
    for step in range(GATHERS):
        begin = time.monotonic()
        try:
            said = control.all_gather(torch.tensor([step, rank], dtype=torch.int64))
        except RuntimeError as error:  # ours, or that somebody left because of it
            result["error"] = str(error)
            break
        seconds.append(time.monotonic() - begin)
        result["right"] &= said.tolist() == [[step, other] for other in range(world)]
    result["gather_seconds"] = statistics.median(seconds) if seconds else None
    (Path(os.environ["JOB_FOLDER"]) / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
