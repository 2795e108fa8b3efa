"""How a watched engine speaks: lines of the log that name workers in full, and the log of events on rank 0."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.telemetry import console
from deepspeed_sentinel.telemetry.eventlog import EventLog
from deepspeed_sentinel.telemetry.events import Event
from deepspeed_sentinel.telemetry.who import Who

_Opened = TypeVar("_Opened")


class Voice:
    """Lines of this rank's, and events where it is rank 0. Collective to create.

    Attributes:
        run_id: of this run, the same on all ranks.

    Args:
        config: whose ``output_dir`` and ``events`` say where events go, if anywhere.
        control: gathers of all ranks.
        who: names the workers.

    Raises:
        ValueError: on every rank, when rank 0 cannot write events.
    """

    def __init__(self, config: SentinelConfig, control: Control, who: Who) -> None:
        self._folder, self._who = config.output_dir, who
        self._said: set[str] = set()
        self.run_id = control.of_first(secrets.token_hex(8))
        wanted = dist.get_rank() == 0 and config.events != "none"
        # Only rank 0 writes, but all ranks must fail together when it cannot.
        self._log, problem = opened(control, (lambda: EventLog(self._folder, self.run_id, who)) if wanted else None)
        if problem:
            raise ValueError(
                f"sentinel.output_dir: cannot write to {self._folder!r}: {problem}. Name a folder that rank 0 can "
                'write to, or set "events": "none".'
            )

    def note(self, text: str, level: int = logging.WARNING) -> None:
        """A line, at a level of logging."""
        console.say(self._who.fill(text), level)

    def of_step(self, step: int, text: str, level: int = logging.WARNING) -> None:
        """A line about a step."""
        self.note(f"step {step}: {text}", level)

    def once(self, kind: str, text: str) -> None:
        """A line of a kind of which one is enough."""
        if kind not in self._said:
            self._said.add(kind)
            self.note(text)

    def event(self, step: int, event: Event) -> None:
        """An event, where there is a log of them."""
        if not self._log:
            return
        try:
            self._log.write(step, event)
        except OSError as error:
            # A full disk is no reason to end a run.
            self._log = None
            self.note(f"cannot write to {self._folder!r} any more: {error}")

    def close(self) -> None:
        """No event comes any more."""
        if self._log:
            try:
                self._log.close()
            except OSError as error:
                self.note(f"cannot write to {self._folder!r} any more: {error}")
            self._log = None


def opened(control: Control, how: Callable[[], _Opened] | None) -> tuple[_Opened | None, str]:
    """What a rank opens, and why rank 0 could not, which all ranks are told; empty if it could. Collective.

    Args:
        control: gathers of all ranks.
        how: opens it, or raises OSError; None on ranks that open nothing.
    """
    found, problem = None, ""
    try:
        found = how() if how else None
    except OSError as error:
        problem = str(error)
    return found, control.of_first(problem)
