"""A line beside a progress bar leaves the bar whole."""

import io
import logging
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from unittest.mock import patch

from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm

from deepspeed_sentinel.telemetry.console import say


@contextmanager
def terminal():
    """What is written to this process's stdout and stderr, by DeepSpeed's handler too, in order.

    No fixture: pytest puts its own streams there after these.
    """
    stream = io.StringIO()
    handlers = [logging.StreamHandler(stream)]
    with (
        redirect_stdout(stream),
        redirect_stderr(stream),
        patch.object(logging.getLogger("DeepSpeed"), "handlers", handlers),
    ):
        yield stream


def test_a_line_has_its_name_and_where_it_comes_from(caplog):
    with (
        patch.object(logging.getLogger("DeepSpeed"), "handlers", [caplog.handler]),
        patch.object(logging.getLogger("DeepSpeed"), "propagate", False),
    ):
        say("step 3: something")
    (record,) = caplog.records
    assert record.getMessage() == "[sentinel] step 3: something" and record.levelno == logging.WARNING
    assert record.filename == "test_console.py"


def test_a_bar_of_tqdm_is_cleared_before_and_drawn_after():
    with terminal() as stream, tqdm(total=4, file=stream, ncols=40, mininterval=0) as bar:
        bar.update(1)
        before = stream.tell()
        say("step 3: something")
        cleared, line, drawn = stream.getvalue()[before:].partition("[sentinel] step 3: something\n")
        assert line and cleared.endswith("\r") and not cleared.strip("\r ") and "1/4" in drawn


def test_a_bar_of_rich_stays_below():
    with terminal() as stream:
        console = Console(file=stream, force_terminal=True, width=60, color_system=None)
        with Progress(console=console, auto_refresh=False) as progress:
            progress.add_task("train", total=4)
            progress.refresh()
            before = stream.tell()
            say("step 3: something")
            said = stream.getvalue()[before:].split("\n")
            where = next(place for place, line in enumerate(said) if "[sentinel] step 3: something" in line)
            assert "\x1b[2K" in said[where] and "train" not in said[where], "the bar's line is erased for it"
            assert "train" in said[where + 1], "and drawn again below"
        before = stream.tell()
        say("step 4: more")
        assert stream.getvalue()[before:] == "[sentinel] step 4: more\n"
