"""What is said of a device: its standing over all runs, and that it is in alarm more often than its peers."""

from __future__ import annotations

import time
from dataclasses import dataclass

from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry import rates
from deepspeed_sentinel.telemetry.book import Book
from deepspeed_sentinel.telemetry.devices import Device


@dataclass(frozen=True)
class Standing:
    """What is known of one device over all runs.

    Attributes:
        key: the name by which it is kept.
        place: where it was last, in words.
        workers: who runs on it in this run; empty if nobody does.
        steps: steps in which a message of its worker was judged, or was in alarm in spite of warm-up.
        judged: messages judged.
        alarmed_steps: those of the steps with an alarm.
        alarms, disputes: messages that told against it; messages in disputes of which it was one side.
        proofs: steps in which it was proved bad, by an exact comparison or by several partners.
        unequal_weights: how often its weights were others than its replicas'.
        first, last: when something was counted, in seconds since 1970.
        trouble: when there was last an alarm, a dispute, a proof or unequal weights; 0 for never.
    """

    key: str
    place: str
    workers: tuple[Worker, ...]
    steps: int
    judged: int
    alarmed_steps: int
    alarms: int
    disputes: int
    proofs: int
    unequal_weights: int
    first: int
    last: int
    trouble: int

    def __str__(self) -> str:
        now = f", now {', '.join(map(str, self.workers))}" if self.workers else ""
        trouble = f", trouble last at {_date(self.trouble)}" if self.trouble else ""
        return (
            f"device {self.key} ({self.place}{now}): proofs {self.proofs}, unequal weights {self.unequal_weights}, "
            f"disputed messages {self.disputes}, alarms in {self.alarmed_steps} of {self.steps} steps from "
            f"{_date(self.first)} to {_date(self.last)}{trouble}"
        )


@dataclass(frozen=True)
class Above:
    """A device that is in alarm more often than its peers: no conviction, a reason to look at it.

    Attributes:
        standing: the device.
        peers: the share of their steps in which the other devices were in alarm.
        chance: that it would come to this by chance, were its rate ``rates.MARGIN`` times theirs; see ``rates``.
    """

    standing: Standing
    peers: float
    chance: float

    def __str__(self) -> str:
        return (
            f"{self.standing}; its peers are in alarm in {self.peers:.3g} of their steps, and a device "
            f"{rates.MARGIN:g} times as often in alarm as they would come to this with a chance of {self.chance:.2g}"
        )


def place_of(book: Book, key: str) -> str:
    """Where a device was last, in words."""
    known = book.places.get(key)
    if not known:
        return "no place known"
    host, slot, pci = max(known, key=lambda place: (known[place], place))
    return str(Device(host, slot, pci=pci)) + (f" and {len(known) - 1} other places" if len(known) > 1 else "")


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
