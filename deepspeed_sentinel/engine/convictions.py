"""Who is convicted, why and on which machine: kept through a run, and written to ``exclude.json`` for the next one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.exclusion import FILE, Convict, exclusions, reason, write_exclusions
from deepspeed_sentinel.telemetry.findings import workers_of
from deepspeed_sentinel.telemetry.who import Who


class Convictions:
    """The convicted workers of a run.

    Args:
        folder: of the file.
        who: names the workers.
        convicted: bool [S, R], as of now.
        step: the engine's global step.
    """

    def __init__(self, folder: str, who: Who, convicted: Callable[[], np.ndarray], *, step: Callable[[], int]) -> None:
        self._path = Path(folder) / FILE
        self._who, self._convicted, self._step = who, convicted, step
        self._why: dict[Worker, tuple[int, str]] = {}
        self._written = False

    def take(self, verdict: Verdict) -> None:
        """Remember why somebody is convicted."""
        for worker in verdict.newly_convicted:
            self._why[worker] = (verdict.step, self._who.fill(reason(verdict, worker)))

    @property
    def convicts(self) -> tuple[Convict, ...]:
        """Who is convicted, and where it runs."""
        unknown = (None, "convicted before this run")
        return tuple(
            Convict(self._who(worker), self._who.device(worker), *self._why.get(worker, unknown))
            for worker in workers_of(self._convicted())
        )

    def write(self) -> Path | None:
        """Write ``exclude.json``: who is convicted, on which machines, and lines for launchers. On rank 0.

        Once this run has written it, it is brought up to date where a conviction was lifted, too. A file that an
        earlier run left stays while nobody is convicted in this one.

        Returns:
            the file; None on other ranks, and where nobody has been convicted.

        Raises:
            OSError: it cannot be written.
        """
        convicts = self.convicts
        if dist.get_rank() != 0 or not (convicts or self._written):
            return None
        write_exclusions(self._path, exclusions(convicts, self._who.devices, self._step()))
        self._written = True
        return self._path
