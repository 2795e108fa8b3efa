"""How a script ends that Sentinel stops or refuses; of the exit code, see docs/failures.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from deepspeed_sentinel.errors import SentinelHalt

HALTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: to be tried again, elsewhere


def ends_with(code: int) -> None:
    """Have this process end with ``code`` if a ``SentinelHalt`` ends it: its traceback is shown, and exit handlers run.

    A script that catches the error ends as it likes.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, SentinelHalt):
            return before(kind, error, trace)
        try:
            before(kind, error, trace)
        except Exception:  # a script's own hook that fails hides neither the reason nor the code
            sys.__excepthook__(kind, error, trace)
        _flush()
        raise SystemExit(code)

    sys.excepthook = hook


@contextmanager
def refused_once(rank: int) -> Iterator[None]:
    """What every rank refuses, settings for one, has its traceback on rank 0 alone: if it ends another, in one line."""
    try:
        yield
    except ValueError as refused:
        before = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if error is not told:
                return before(kind, error, trace)
            print(f"[sentinel] rank {rank}: {' '.join(str(error).split())}", file=sys.stderr)

        told = refused
        if rank:
            sys.excepthook = hook
        raise


def _flush() -> None:
    """What was printed and cannot be written, on a full disk for one, is given up: Python would end with 120 for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
