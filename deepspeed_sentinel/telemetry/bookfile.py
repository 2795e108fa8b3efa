"""The ledger's file: how a book is written down, and how several writers share one file.

Whoever writes takes the lock of ``<name>.lock``, reads what is there, merges its own into it, writes a temporary file
to its end and puts it in the place of the old one. So readers see a whole file always, and two writers lose nothing.
Where a file system has no locks two writers may overtake each other; each has all that it counted in memory, so what is
missing is there again with its next writing.

| what is found | what is done |
|---|---|
| no file | it is made |
| a file of this schema | merged |
| a file that is no ledger: torn, empty, mistyped | set aside as ``<name>.broken-<n>``, told, and a new one begun |
| a ledger of a later schema | left untouched, told, and this run's is ``ledger.schema-1.json`` beside it |
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepspeed_sentinel.telemetry.book import COLUMNS, COUNTS, LATEST, MOST, PLACES, TIMES, Book, Entry, Place, Runs
from deepspeed_sentinel.telemetry.devices import Device

SCHEMA = 1
_KEY = re.compile(r"[A-Za-z0-9._:@/-]{1,400}")
_RUN = re.compile(r"[A-Za-z0-9-]{1,64}")
_LARGEST = (*[MOST] * len(COUNTS), *[LATEST] * len(TIMES))
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_PATIENCE, _PAUSE = 5.0, 0.05  # seconds that the lock is waited for


class LaterSchema(ValueError):
    """A ledger that a later version of this package wrote."""


class LockBusy(OSError):
    """Another writer holds the lock of a ledger for longer than anybody should."""


def to_text(book: Book) -> str:
    """A book as JSON: one line for each device, and one for each device of each entry."""
    total = book.total()
    devices = []
    for key, row in zip(total.keys, total.table.tolist(), strict=True):
        places = [
            {"host": host, "slot": slot, "pci": pci, "last": last}
            for (host, slot, pci), last in book.places.get(key, {}).items()
        ]
        known = {"total": dict(zip(COLUMNS, row, strict=True)), "places": places}
        devices.append(f"{json.dumps(key)}: {json.dumps(known)}")
    entries = []
    for runs, entry in sorted(book.entries.items(), key=lambda item: sorted(item[0])):
        rows = [f"{json.dumps(key)}: {row}" for key, row in zip(entry.keys, entry.table.tolist(), strict=True)]
        entries.append(f'{{"runs": {json.dumps(sorted(runs))}, "counts": {_lines(rows, "{}")}}}')
    return (
        f'{{"schema": {SCHEMA},\n"columns": {json.dumps(COLUMNS)},\n'
        f'"devices": {_lines(devices, "{}")},\n"entries": {_lines(entries, "[]")}}}\n'
    )


def from_text(text: bytes) -> Book:
    """The inverse of ``to_text``, of anybody's bytes. Totals are not read: they follow from the rest.

    Raises:
        LaterSchema: it is of a later version.
        ValueError: it is no ledger, with the reason.
    """
    try:
        read = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(read, dict) or not _whole(read.get("schema"), 1, MOST):
        raise ValueError('it has no "schema", a whole number from 1')
    if read["schema"] > SCHEMA:
        raise LaterSchema(f"it is of schema {read['schema']}, and this version knows schema {SCHEMA}")
    devices, entries = read.get("devices"), read.get("entries")
    if read.get("columns") != list(COLUMNS) or not isinstance(devices, dict) or not isinstance(entries, list):
        raise ValueError(f'it lacks "devices", "entries" or the "columns" {list(COLUMNS)}')
    places = {_checked(key, _KEY): _read_places(known) for key, known in devices.items()}
    found: dict[Runs, Entry] = {}
    for entry in entries:
        runs, counted = _read_entry(entry)
        if runs in found:
            raise ValueError(f"it has two entries of the runs {sorted(runs)!r:.100}")
        found[runs] = counted
    return Book().merged(Book(found, places))


class BookFile:
    """A ledger's file on disk.

    Attributes:
        path: where it is; another one beside it once a later version's is found there.

    Args:
        path: where it ought to be.
        tell: gets a line about each thing out of the ordinary.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path = path
        self._tell = tell
        self._unlocked = False
        self._lock = path.with_name(f"{path.name}.lock")

    def read(self) -> Book:
        """What is there; a file that is no ledger is set aside.

        Raises:
            LockBusy: another writer holds the lock.
            OSError: the file, or its folder, cannot be made, read or written to.
        """
        with self._locked():
            return self._read()

    def exchange(self, change: Callable[[Book], Book]) -> Book:
        """Write what ``change`` makes of what is there, and return it. Raises as ``read`` does; the file is whole then.

        Args:
            change: what is there -> what shall be.
        """
        with self._locked():
            book = change(self._read())
            self._write(to_text(book))
            return book

    def _read(self) -> Book:
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return Book()
        try:
            return from_text(text)
        except LaterSchema as error:
            beside = self.path.with_name(f"{self.path.stem}.schema-{SCHEMA}{self.path.suffix}")
            self._tell(
                f"{self.path} was written by a later version: {error}. It is left as it is, and this run's counts go "
                f"to {beside}; update deepspeed_sentinel to have them in one"
            )
            self.path = beside
            return self._read()
        except ValueError as error:
            aside = self._set_aside()
            self._tell(
                f"{self.path} cannot be read as a ledger: {error}. It was set aside as {aside.name}, and a new one is "
                "begun with what this run and its checkpoint know; what else it held is in there, for you to mend"
            )
            return Book()

    def _set_aside(self) -> Path:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.broken-{number}")).exists():
            number += 1
        self.path.rename(aside)
        return aside

    def _write(self, text: str) -> None:
        if not self._unlocked:
            # Whoever holds the lock is the only writer, so these are of writers that were killed.
            for left in self.path.parent.glob(f"{self.path.name}.*.tmp"):
                left.unlink(missing_ok=True)
        new = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a") as file:  # closing it gives the lock back, as the end of the process does
            self._take(file.fileno())
            yield

    def _take(self, lock: int) -> None:
        until = time.monotonic() + _PATIENCE
        while not self._unlocked:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _BUSY:
                    self._unlocked = True
                    self._tell(
                        f"{self._lock} cannot be locked ({error}): as long as another run writes {self.path} too, it "
                        "may lack the latest counts of one of them. Name a folder on a file system with locks"
                    )
                elif time.monotonic() > until:
                    raise LockBusy(
                        error.errno,
                        f"another process has held it for {_PATIENCE:g} s; nothing was written, and will be next time",
                        str(self._lock),
                    ) from error
                else:
                    time.sleep(_PAUSE)


def _lines(rows: list[str], brackets: str) -> str:
    return "\n".join((brackets[0], ",\n".join(rows), brackets[1])) if rows else brackets


def _read_places(known: Any) -> Mapping[Place, int]:
    places = known.get("places") if isinstance(known, dict) else None
    if not isinstance(places, list) or len(places) > PLACES or not all(isinstance(place, dict) for place in places):
        raise ValueError(f'"places" of a device is {places!r:.100}; allowed is a list of at most {PLACES} objects')
    result: dict[Place, int] = {}
    for place in places:
        host, slot, pci, last = (place.get(name) for name in ("host", "slot", "pci", "last"))
        if not (isinstance(host, str) and isinstance(pci, str) and _whole(slot, 0, MOST) and _whole(last, 0, LATEST)):
            raise ValueError(
                f'a place is {place!r:.100}; allowed are texts as "host" and "pci", and whole numbers as "slot" and '
                f'"last", the latter up to {LATEST}'
            )
        where = Device(host, slot, pci=pci)
        result[(where.host, where.slot, where.pci)] = last
    return result


def _read_entry(entry: Any) -> tuple[Runs, Entry]:
    runs, counts = (entry.get("runs"), entry.get("counts")) if isinstance(entry, dict) else (None, None)
    if not isinstance(runs, list) or not runs or not isinstance(counts, dict):
        raise ValueError(f'an entry is {entry!r:.100}; allowed are a list "runs" and an object "counts"')
    keys = tuple(sorted(_checked(key, _KEY) for key in counts))
    rows = [counts[key] for key in keys]
    for key, row in zip(keys, rows, strict=True):
        if (
            not isinstance(row, list)
            or len(row) != len(COLUMNS)
            or not all(_whole(value, 0, most) for value, most in zip(row, _LARGEST, strict=True))
        ):
            raise ValueError(
                f"counts of {key} are {row!r:.100}; allowed are {len(COLUMNS)} whole numbers from 0, as times up to "
                f"{LATEST}"
            )
    table = np.array(rows, np.int64).reshape(len(rows), len(COLUMNS))
    return frozenset(_checked(run, _RUN) for run in runs), Entry(keys, table)


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _checked(text: Any, form: re.Pattern[str]) -> str:
    if not isinstance(text, str) or not form.fullmatch(text):
        raise ValueError(f"a name is {text!r:.100}; allowed is what matches {form.pattern}")
    return text
