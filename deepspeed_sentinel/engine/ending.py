"""The exit code of a script that Sentinel stops, for launchers and schedulers; see docs/failures.md."""

from __future__ import annotations

import sys
from types import TracebackType

from deepspeed_sentinel.errors import SentinelHalt

HALTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: to be tried again, elsewhere


def ends_with(code: int) -> None:
    """Have this process end with ``code`` if a ``SentinelHalt`` ends it: its traceback is shown, and exit handlers run.

    A script that catches the error ends as it likes.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        if isinstance(error, SentinelHalt):
            raise SystemExit(code)

    sys.excepthook = hook
