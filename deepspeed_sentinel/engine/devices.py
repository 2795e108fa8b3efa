"""The ledger of devices, kept through a run by rank 0: its counts, its file, its place in checkpoints.

``Sentinel`` creates it, and calls ``begin`` when the engine is watched, ``step`` after each training step and ``close``
at the end. ``checkpoint.py`` calls ``write`` and ``state_dict`` before a checkpoint is saved, and ``load_state_dict``
after one was loaded, whatever becomes of the rest of it: what is known of devices holds for any mesh. Nothing here ends
a run once it has begun, and nothing takes a count back.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine.checkpoint import to_tensors
from deepspeed_sentinel.engine.reduction import Poisoned
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.engine.voice import opened
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.book import DRILL_FILE, FILE
from deepspeed_sentinel.telemetry.devices import Device, own_device, read_gathered, to_bytes
from deepspeed_sentinel.telemetry.ledger import Ledger, step_counts

WRITE_SECONDS = 300.0
KEY, DRILL_KEY = "ledger", "drill_ledger"


def gather_devices(
    control: Control, ranks: np.ndarray, device: torch.device
) -> tuple[tuple[tuple[Device, ...], ...], tuple[str, ...]]:
    """Every worker's device [S][R], the same on all ranks, and what to tell about them. Collective.

    Args:
        control: gathers of all ranks.
        ranks: int [S, R], the global rank of each worker.
        device: on which this rank computes.
    """
    return read_gathered(control.all_gather(torch.from_numpy(to_bytes(own_device(device)))).numpy(), ranks)


class DeviceRecord:
    """Keeps what verdicts say of devices. Collective to create; on ranks but 0 its methods do nothing.

    Attributes:
        ledger: on rank 0; None on others.

    Args:
        config: whose ``output_dir`` the file is in; with ``events`` "none" there is no file. While faults are injected
            it is a drill's, and so is what checkpoints hold.
        devices: [S][R], the device of each worker.
        control: gathers of all ranks.
        telling: says what is known of devices.
        step: the engine's global step.
        clock: in seconds, for the time from one writing to the next.

    Raises:
        ValueError: on every rank, when rank 0 cannot read or make the file.
    """

    def __init__(
        self,
        config: SentinelConfig,
        devices: tuple[tuple[Device, ...], ...],
        control: Control,
        telling: Telling,
        *,
        step: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._telling, self._step, self._clock = telling, step, clock
        self._shape = (len(devices), len(devices[0]))
        self._key = DRILL_KEY if config.inject else KEY
        self._due = clock() + WRITE_SECONDS
        self._found: set[tuple[str, Worker]] = set()  # in this run: "proof" or "weights"
        self._named: set[tuple[str, str]] = set()
        self._convicted = np.zeros(self._shape, bool)
        self.ledger = self._open(config, devices, control)
        if self.ledger:
            # A script need not detach, and one that ends by an error does not.
            atexit.register(self.write)

    def begin(self) -> None:
        """Name the devices of this run with a proof behind them from a run before."""
        self._name()

    def step(
        self, verdict: Verdict, served: np.ndarray, poisoned: Poisoned | None, unequal: Collection[Worker]
    ) -> None:
        """Count what one step said, and write now and then, or at once where a worker is proved otherwise.

        Args:
            verdict: of the step.
            served: int [S, C], who served each column.
            poisoned: what was wrong with its reduction.
            unequal: who held other weights than most before it.
        """
        if not self.ledger:
            return
        self._convicted = verdict.convicted
        proved = {*verdict.proved, *(poisoned.named if poisoned else ())}
        self.ledger.record(
            **step_counts(verdict, served), proofs=self._marked(proved), unequal_weights=self._marked(unequal)
        )
        new = {*(("proof", worker) for worker in proved), *(("weights", worker) for worker in unequal)} - self._found
        self._found |= new
        if new or self._clock() >= self._due:
            self.write()

    def write(self) -> None:
        """Bring the file up to date, and tell of devices whose rate of alarms lies above their peers'.

        Not of a convicted worker's: the conviction says more.
        """
        if not self.ledger:
            return
        self._due = self._clock() + WRITE_SECONDS
        try:
            self.ledger.write()
        except OSError as error:
            self._telling.unwritten(error)
        for above in self.ledger.report():
            convicted = any(self._convicted[worker] for worker in above.standing.workers)
            if not convicted and self._is_new("rate", above.standing.key):
                self._telling.device(self._step(), above)
        self._name()  # where another process held the lock when the run began, the file was read only now

    def close(self) -> None:
        """Write for the last time."""
        self.write()
        atexit.unregister(self.write)

    def state_dict(self) -> dict[str, Any]:
        """For rank 0's checkpoint: all that is known, under one key. Nothing on other ranks."""
        return {self._key: to_tensors(self.ledger.state_dict())} if self.ledger else {}

    def load_state_dict(self, state: Any) -> None:
        """Add what a checkpoint knows, and name whom it makes known.

        Args:
            state: Sentinel's of a checkpoint, or what is there in its place.
        """
        known = state.get(self._key) if isinstance(state, Mapping) else None
        if self.ledger and isinstance(known, Mapping):
            self.ledger.load_state_dict(known)
            self._name()

    def _open(self, config: SentinelConfig, devices: tuple[tuple[Device, ...], ...], control: Control) -> Ledger | None:
        """Only rank 0 has one, but all ranks must fail together when it cannot."""
        file = DRILL_FILE if config.inject else FILE
        path = None if config.events == "none" else Path(config.output_dir) / file
        ledger, problem = opened(control, (lambda: Ledger(path, devices)) if dist.get_rank() == 0 else None)
        if problem:
            raise ValueError(
                f"sentinel.output_dir: cannot keep a ledger of devices in {config.output_dir!r}: {problem}. Name a "
                f'folder in which rank 0 can read and write {file}, or set "events": "none".'
            )
        return ledger

    def _name(self) -> None:
        if not self.ledger:
            return
        self._telling.ledger(self.ledger.told())
        for standing in self.ledger.named():
            told = any(("proof", worker) in self._found for worker in standing.workers)
            if self._is_new("proof", standing.key) and not told:
                self._telling.device(self._step(), standing)

    def _is_new(self, why: str, key: str) -> bool:
        """Once a run for each reason."""
        new = (why, key) not in self._named
        self._named.add((why, key))
        return new

    def _marked(self, workers: Collection[Worker]) -> np.ndarray:
        """int [S, R], 1 for each of them."""
        marked = np.zeros(self._shape, np.int64)
        for worker in workers:
            marked[worker] = 1
        return marked
