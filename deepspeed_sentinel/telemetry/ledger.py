"""The ledger: what is known of each device, over steps, restarts and changes of placement.

Silent faults come back on the same GPU, seconds to days apart, and a run that starts on it knows nothing of them. So
rank 0 keeps by device (``devices.py``) what the verdicts said of the worker that ran on it, in every checkpoint and in
``ledger.json`` beside the events (``bookfile.py``), in a form that merges without counting anything twice
(``book.py``). People read it: a device with a proof behind it is named when a run starts on it, and one that is in
alarm more often than its peers (``rates.py``) is reported (``standing.py``). No verdict depends on it: what a device is
called is its own word. What is found while faults are injected on purpose says nothing of a device: a drill has a
ledger of its own, ``drill_ledger.json``, in checkpoints too.

    engine, at attach     own_device -> to_bytes -> gathered -> read_gathered -> Ledger -> named(), told()
            each step     record(**step_counts(verdict, served), proofs=..., unequal_weights=...)
            now and then, before each checkpoint, at the end     write(), report(), told()
            checkpoints   state_dict(), load_state_dict()
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry import rates
from deepspeed_sentinel.telemetry.book import COLUMNS, COUNTS, FIRST, LAST, MOST, TROUBLE, Book, Entry, Place
from deepspeed_sentinel.telemetry.bookfile import BookFile, LockBusy, from_text, to_text
from deepspeed_sentinel.telemetry.devices import UNNAMED, Device, keys_of
from deepspeed_sentinel.telemetry.standing import Above, Standing, place_of

_TROUBLE_FROM = COUNTS.index("alarms")  # this count and those after it are trouble


class Ledger:
    """Keeps what is known of devices. Rank 0 has one, in its main thread; other ranks need none.

    Args:
        path: of ``ledger.json``; None keeps it in memory, and in checkpoints, alone.
        devices: [S][R], the devices of this run's workers.
        clock: seconds since 1970.

    Raises:
        OSError: the file or its folder cannot be made or read.
        ValueError: the stages have not all as many devices.
    """

    def __init__(
        self, path: Path | None, devices: Sequence[Sequence[Device]], clock: Callable[[], float] = time.time
    ) -> None:
        if not devices or not devices[0] or len({len(of_stage) for of_stage in devices}) > 1:
            raise ValueError(
                f"devices of a mesh are {[len(of_stage) for of_stage in devices]} in each stage; give [S][R], one for "
                "each worker"
            )
        self._told: list[str] = []
        self._clock = clock
        self._devices = devices
        keys, told = keys_of(devices)
        self._told += told
        self._shape = (len(keys), len(keys[0]))
        flat = [key for of_stage in keys for key in of_stage]
        self._keys = tuple(sorted(set(flat)))
        index = {key: place for place, key in enumerate(self._keys)}
        self._index = np.array([index[key] for key in flat]).reshape(self._shape)
        self._workers: dict[str, list[Worker]] = defaultdict(list)
        for stage, of_stage in enumerate(keys):
            for replica, key in enumerate(of_stage):
                self._workers[key].append(Worker(stage, replica))
        self._begin_run()
        self._book = Book({}, self._places())
        self._file = BookFile(path, self._told.append) if path else None
        if self._file:
            try:
                self._book = self._book.merged(self._file.read())
            except LockBusy as error:
                self._told.append(f"the ledger is read later: {error}")

    def record(
        self,
        *,
        judged: np.ndarray,
        alarms: np.ndarray,
        disputes: np.ndarray,
        proofs: np.ndarray,
        unequal_weights: np.ndarray,
    ) -> None:
        """Add what one step said of each worker; int [S, R] each, see ``Standing`` for what is counted.

        Raises:
            ValueError: an array has another shape, is not of whole numbers, or has some below 0.
        """
        given = {
            "judged": judged,
            "alarms": alarms,
            "disputes": disputes,
            "proofs": proofs,
            "unequal_weights": unequal_weights,
        }
        for name, array in given.items():
            if array.shape != self._shape or array.dtype.kind not in "iu" or (array < 0).any():
                raise ValueError(
                    f"{name} is {array.dtype} {list(array.shape)}, from {array.min(initial=0)}; allowed are whole "
                    f"numbers from 0, {list(self._shape)}: one for each stage and replica"
                )
        given["steps"] = (judged > 0) | (alarms > 0)
        given["alarmed_steps"] = alarms > 0
        step = np.stack([given[name] for name in COUNTS], axis=-1).astype(np.int64)
        now = int(self._clock())
        self._counted += step
        touched, trouble = step.any(-1), step[..., _TROUBLE_FROM:].any(-1)
        self._times[..., 0][touched & (self._times[..., 0] == 0)] = now
        self._times[..., 1][touched] = now
        self._times[..., 2][trouble] = now

    def write(self) -> bool:
        """Merge all that is known into the file. Whether it was written; if not, the next writing has all of it.

        Raises:
            OSError: it cannot be written to; what was there is there still.
        """
        if not self._file:
            return False
        try:
            self._book = self._file.exchange(lambda there: self._known(there).folded(self._clock()))
        except LockBusy as error:
            self._told.append(f"the ledger was not written: {error}")
            return False
        self._written = self._counted.copy()
        return True

    def state_dict(self) -> dict[str, np.ndarray]:
        """All that is known: ``json``, uint8 [N], the text that the file has."""
        return {"json": np.frombuffer(to_text(self._known(Book())).encode(), np.uint8).copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Merge what a checkpoint knows. What cannot be read is told and left out: a run does not end by it.

        Args:
            state: as ``state_dict`` gave it; tensors of the CPU do as well.
        """
        try:
            text = np.asarray(state.get("json"))
            if text.dtype != np.uint8 or text.ndim != 1:
                raise ValueError(f'its "json" is {text.dtype} {list(text.shape)}, not uint8 [N]')
            self._book = self._book.merged(from_text(text.tobytes()))
        except (TypeError, ValueError) as error:
            self._told.append(f"the checkpoint's ledger of devices is left out: {error}")

    def standings(self) -> tuple[Standing, ...]:
        """What is known of each device, of this run and others; in the order of their names."""
        book = self._known(Book())
        total = book.total()
        return tuple(
            Standing(key, place_of(book, key), tuple(self._workers.get(key, ())), *row)
            for key, row in zip(total.keys, total.table.tolist(), strict=True)
        )

    def named(self) -> tuple[Standing, ...]:
        """Devices of this run with a proof behind them, from whichever run."""
        return tuple(one for one in self.standings() if one.proofs and one.workers and one.key != UNNAMED)

    def report(self) -> tuple[Above, ...]:
        """Devices that are in alarm more often than their peers, those of this run or not; see ``rates``."""
        known = [one for one in self.standings() if one.steps and one.key != UNNAMED]
        above, chance, peers = rates.above_peers(
            np.array([one.alarmed_steps for one in known], np.int64), np.array([one.steps for one in known], np.int64)
        )
        return tuple(Above(known[at], float(peers[at]), float(chance[at])) for at in np.flatnonzero(above))

    def told(self) -> tuple[str, ...]:
        """Lines about what is out of the ordinary, since they were last asked for."""
        told = tuple(self._told)
        self._told.clear()
        return told

    def _begin_run(self) -> None:
        """Count from nothing, under an id that nobody else has."""
        self._run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(self._clock()))}-{secrets.token_hex(8)}"
        self._counted = np.zeros((*self._shape, len(COUNTS)), np.int64)
        self._written = self._counted.copy()
        self._times = np.zeros((*self._shape, 3), np.int64)

    def _known(self, there: Book) -> Book:
        """All that this run, what it has read, and ``there`` know."""
        book = self._book.merged(there)
        if any(self._run in runs for runs in book.entries if len(runs) > 1):
            # Silent for so long that another run folded this one: what was written is in there, the rest is new.
            rest, times = self._counted - self._written, self._times
            self._begin_run()
            self._counted, self._times = rest, times
        return book.merged(Book({frozenset([self._run]): self._entry()} if self._counted.any() else {}, self._places()))

    def _entry(self) -> Entry:
        """This run's counts by device; several workers may run on one."""
        table = np.zeros((len(self._keys), len(COLUMNS)), np.int64)
        np.add.at(table[:, : len(COUNTS)], self._index, self._counted)
        first, last, trouble = np.moveaxis(self._times, -1, 0)
        table[:, FIRST] = MOST
        np.minimum.at(table[:, FIRST], self._index, np.where(first > 0, first, MOST))
        np.maximum.at(table[:, LAST], self._index, last)
        np.maximum.at(table[:, TROUBLE], self._index, trouble)
        counted = table[:, : len(COUNTS)].any(1)
        return Entry(tuple(np.array(self._keys, object)[counted].tolist()), table[counted])

    def _places(self) -> dict[str, dict[Place, int]]:
        now = int(self._clock())
        places: dict[str, dict[Place, int]] = {}
        for key, workers in self._workers.items():
            here = [self._devices[stage][replica] for stage, replica in workers]
            places[key] = {(one.host, one.slot, one.pci): now for one in here if one.host}
        return places


def step_counts(verdict: Verdict, served: np.ndarray) -> dict[str, np.ndarray]:
    """Of one verdict: ``judged``, ``alarms`` and ``disputes`` for ``Ledger.record``, int64 [S, R] each.

    Only micro-batches that tell against a worker are its alarms: what its content, loss scaling or conspicuous work
    before it explains says nothing about its device. A dispute counts on both its sides, unless it is known which
    of them is at fault.

    Args:
        served: int [S, C], which replica served which column.
    """
    judged, alarms, disputes = np.zeros((3, *verdict.convicted.shape), np.int64)
    if verdict.judged:
        messages = verdict.alarms.shape[3]
        stage = np.broadcast_to(np.arange(len(served))[:, None], served.shape)
        # Forward all but the last stage send, backward all but the first.
        for senders in (slice(None, -1), slice(1, None)):
            np.add.at(judged, (stage[senders], served[senders]), messages)
    for finding in verdict.findings:
        alarms[finding.worker] += len(finding.striking)
    for dispute in verdict.disputed:
        for side in (dispute.at_fault,) if dispute.at_fault else (dispute.sender, dispute.receiver):
            disputes[side] += len(dispute.micro_batches)
    return {"judged": judged, "alarms": alarms, "disputes": disputes}
