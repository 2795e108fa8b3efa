"""Process groups of one scenario, ended after it: DeepSpeed leaves them, and with many of them a job slows down."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d


def known() -> set[object]:
    """The groups that exist now."""
    return set(distributed_c10d._world.pg_map)


def end(before: set[object]) -> None:
    """End the groups that came since ``known()`` returned ``before``. To be called on every rank."""
    dist.barrier()
    for group in [group for group in distributed_c10d._world.pg_map if group not in before]:
        dist.destroy_process_group(group)
