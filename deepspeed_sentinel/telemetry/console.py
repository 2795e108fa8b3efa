"""Lines for the terminal: through DeepSpeed's logger, and beside progress bars instead of into them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_logger = logging.getLogger("DeepSpeed")


def say(text: str, level: int = logging.WARNING) -> None:
    """One line of Sentinel's. It is a warning at least, since DeepSpeed's logger and its handler hide what is less."""
    with _beside_bars():
        _logger.log(level, f"[sentinel] {text}", stacklevel=2)


@contextmanager
def _beside_bars() -> Iterator[None]:
    """Bars of tqdm are cleared for what is written inside and drawn again below it; rich's are left by its own way.

    Neither is imported for it: without a bar there is nothing to do.
    """
    rich, tqdm = sys.modules.get("rich.file_proxy"), sys.modules.get("tqdm.std")
    moved = []
    if rich is not None and isinstance(sys.stdout, rich.FileProxy):
        # DeepSpeed's handler has kept the stream that rich stands before while its bar is shown.
        behind = sys.stdout.rich_proxied_file
        moved = [one for one in _logger.handlers if isinstance(one, logging.StreamHandler) and one.stream is behind]
    for handler in moved:
        handler.setStream(sys.stdout)
    try:
        if tqdm is None:
            yield
        else:
            with tqdm.tqdm.external_write_mode():
                yield
    finally:
        for handler in moved:
            handler.setStream(behind)
