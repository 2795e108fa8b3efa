"""Runs in processes of their own, one thread each, that never outlive the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed_sentinel.simulation.options import SimulationOptions


@contextmanager
def one_thread_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes start when they are first needed, and end at once when the block is left by an error."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    pool.shutdown()


def run_alone(options: SimulationOptions, trunk: Path | None = None) -> dict[str, Any]:
    """One run without a progress bar, from a trunk if there is one; the contents of its ``result.json``."""
    from deepspeed_sentinel.simulation.branching import Trunk
    from deepspeed_sentinel.simulation.run import Simulation

    simulation = Simulation(options) if trunk is None else Trunk.read(trunk).branch(options)
    return simulation.run()


def grow_trunk(path: Path, runs: Sequence[SimulationOptions]) -> None:
    """The steps that ``runs`` have in common, for ``run_alone``."""
    from deepspeed_sentinel.simulation.branching import Trunk

    Trunk.grow(runs).write(path)


def _begin() -> None:
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
