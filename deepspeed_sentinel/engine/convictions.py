"""Who is convicted, why and on which machine: kept through a run, and written to ``exclude.json`` for the next one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import Worker, workers_of
from deepspeed_sentinel.telemetry.devices import NOBODY
from deepspeed_sentinel.telemetry.exclusion import (
    FILE,
    Convict,
    exclusions,
    proved,
    read_earlier,
    read_saved,
    reason,
    saved,
    write_exclusions,
)
from deepspeed_sentinel.telemetry.who import Who, place_of


class Convictions:
    """The convicted workers of a run.

    Args:
        folder: of the file.
        who: names the workers.
        convicted: bool [S, R], as of now.
        step: the engine's global step.
        injected: faults are injected on purpose.
    """

    def __init__(
        self,
        folder: str,
        who: Who,
        convicted: Callable[[], np.ndarray],
        *,
        step: Callable[[], int],
        injected: bool = False,
    ) -> None:
        self._path, self._injected = Path(folder) / FILE, injected
        self._who, self._convicted, self._step = who, convicted, step
        # Asked now, since a script may end its process group before the run's end is told.
        self._first = dist.get_rank() == 0
        self._known: dict[Worker, Convict] = {}
        self._earlier: list[dict[str, Any]] | None = None  # once this run has written the file

    def take(self, verdict: Verdict, observed: bool = False) -> bool:
        """Remember why somebody is convicted, and on which machine it was. Whether there was anything new.

        Whom statistics alone have convicted may be proved later on.

        Args:
            verdict: of a step.
            observed: nothing is kept out of the weights.
        """
        later = [worker for worker in verdict.proved if worker in self._known and not self._known[worker].proved]
        new = dict.fromkeys((*verdict.newly_convicted, *later))
        for worker in new:
            why = self._who.fill(reason(verdict, worker))
            place, device = self._who(worker), self._who.device(worker)
            by_proof = proved(verdict, worker)
            self._known[worker] = Convict(place, device, verdict.step, why, by_proof, observed, self._injected)
        return bool(new)

    @property
    def convicts(self) -> tuple[Convict, ...]:
        """Who is convicted, and where it ran then."""
        return tuple(self._known.get(worker) or self._unknown(worker) for worker in workers_of(self._convicted()))

    @property
    def replaced(self) -> tuple[Convict, ...]:
        """Those in whose place another machine is now: their convictions do not hold for it."""
        return tuple(one for one in self.convicts if one.device.is_another(self._who.device(one.worker)))

    def _unknown(self, worker: Worker) -> Convict:
        place = place_of(worker, self._who(worker).rank, NOBODY)
        return Convict(place, NOBODY, None, "convicted before this run, and where it ran is not known")

    def state_dict(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return saved(self.convicts)

    def load_state_dict(self, state: Any) -> None:
        """The inverse; what is none of its entries is left out."""
        self._known = read_saved(state)

    def write(self) -> Path | None:
        """Write ``exclude.json``: who is convicted, on which machines, and lines for launchers. On rank 0.

        Once this run has written it, it is brought up to date where a conviction was lifted, too. What an earlier run
        left in it stays, so that no later start takes those machines back; whoever trusts them again deletes the file.

        Returns:
            the file; None on other ranks, and where nobody has been convicted.

        Raises:
            OSError: it cannot be read or written.
            ValueError: a file of that name is there that is none of ours.
        """
        convicts = self.convicts
        if not self._first or (self._earlier is None and not convicts):
            return None
        earlier = read_earlier(self._path) if self._earlier is None else self._earlier
        write_exclusions(self._path, exclusions(convicts, self._who.devices, self._step(), earlier, self._injected))
        self._earlier = earlier
        return self._path
