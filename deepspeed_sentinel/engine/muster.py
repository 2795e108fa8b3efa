"""All ranks guard, or it is said which do not: a Sentinel is collective, and one rank without it would stop the others.

That is a node without the package, with another config file, or with the flag switched off in its environment.
"""

from __future__ import annotations

import itertools
import time
from datetime import timedelta

from deepspeed.utils import logger
from torch.distributed import Store

from deepspeed_sentinel.errors import SentinelError

_ADVICE = (
    'Install the package on every node, give every rank the same "sentinel" block, and look for DEEPSPEED_SENTINEL=0 '
    "and TORCH_DEVICE_BACKEND_AUTOLOAD=0 in their environment"
)
_turns = itertools.count()


def muster(store: Store, rank: int, size: int, *, limit: float, patience: float = 30.0) -> None:
    """Wait until every rank is here, over the store that they found each other by.

    Args:
        store: of all ranks.
        rank, size: of this process; how many there are.
        limit: seconds after which it is given up.
        patience: seconds from one line about who is missing to the next.

    Raises:
        SentinelError: some ranks did not come.
    """
    turn, started = next(_turns), time.monotonic()
    keys = [f"sentinel/{turn}/{other}" for other in range(size)]
    store.set(keys[rank], "here")
    while True:
        left = limit - (time.monotonic() - started)
        try:
            store.wait(keys, timedelta(seconds=max(0.001, min(patience, left))))
            return
        except RuntimeError:  # torch's DistStoreError is one
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
        who = f"ranks {', '.join(map(str, missing))}"
        if missing and time.monotonic() - started >= limit:
            raise SentinelError(f"{who} do not guard, and a part of the ranks cannot. {_ADVICE}.")
        if missing and rank == min(set(range(size)) - set(missing)):
            logger.warning(f"[sentinel] waiting for {who}, which do not guard yet. {_ADVICE}")
