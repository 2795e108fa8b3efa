"""Who a worker is, for people who have to act: beside its place in the mesh its rank, its host and its device.

    Worker(1, 2)   stage 1, replica 2 (rank 7, node-03, cuda:3, GPU-1a2b3c4d)

Whatever is said of a worker in a log, an event, a callback or an error names it by ``Who``. Judgement knows no
machines, and its texts are the same on all ranks: they say "worker (stage 1, replica 2)", and ``Who.fill`` completes
them where they reach people. Hosts and devices are what each worker says of itself; see ``devices``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.mesh import NAMED, Worker
from deepspeed_sentinel.telemetry.devices import Device

_BARE = re.compile(rf"(?:rank \d+ = )?{NAMED.pattern}")
_SHOWN = 8  # characters of a uuid in a text: enough to find it by; events have all of it


@dataclass(frozen=True)
class Place:
    """A worker and where it runs, in its own words.

    Attributes:
        stage, replica: the worker.
        rank: its global rank in this run.
        local_rank: its number among the processes of its host; None where it did not say.
        host: the name of its host; None where it did not say.
        device: as torch calls it there, such as "cuda:3" or "cpu"; None where it did not say.
        gpu: its GPU as ``nvidia-smi -L`` has it, "GPU-" and the uuid; None without one.
    """

    stage: int
    replica: int
    rank: int
    local_rank: int | None
    host: str | None
    device: str | None
    gpu: str | None

    def __str__(self) -> str:
        gpu = self.gpu and self.gpu[: len("GPU-") + _SHOWN]
        where = ", ".join(filter(None, (f"rank {self.rank}", self.host, self.device, gpu)))
        return f"stage {self.stage}, replica {self.replica} ({where})"


def place_of(worker: Worker, rank: int, device: Device) -> Place:
    """Of a worker that says that it runs on this device."""
    if not device.host:
        return Place(*worker, rank, None, None, None, None)
    gpu = f"GPU-{device.uuid}" if device.uuid else None
    return Place(*worker, rank, device.slot, device.host, device.name or None, gpu)


class Who:
    """Names the workers of one run.

    Args:
        ranks: int [S, R], the global rank of each.
        devices: [S][R], the device of each.
    """

    def __init__(self, ranks: np.ndarray, devices: Sequence[Sequence[Device]]) -> None:
        self._ranks = ranks
        self.devices = devices

    def __call__(self, worker: Worker) -> Place:
        """Of a worker of this run."""
        return place_of(worker, int(self._ranks[worker]), self.device(worker))

    def device(self, worker: Worker) -> Device:
        """All that a worker says of its device."""
        return self.devices[worker.stage][worker.replica]

    def fill(self, text: str) -> str:
        """A text in which every worker of this run that is named by its place alone is named in full."""

        def full(found: re.Match[str]) -> str:
            worker = Worker(*map(int, found.groups()))
            inside = worker.stage < len(self._ranks) and worker.replica < len(self._ranks[0])
            return str(self(worker)) if inside else found[0]

        return _BARE.sub(full, text)
