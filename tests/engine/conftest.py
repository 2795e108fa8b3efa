from datetime import timedelta

import pytest
import torch.distributed as dist


@pytest.fixture
def free_store():
    """A store of its own."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


@pytest.fixture
def one_rank(free_store):
    """A default group of this process alone."""
    dist.init_process_group("gloo", store=free_store, rank=0, world_size=1)
    yield free_store
    if dist.is_initialized():  # a script may have ended it
        dist.destroy_process_group()
