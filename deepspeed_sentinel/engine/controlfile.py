"""``control.json`` in the output folder: a change of settings by somebody who cannot touch the script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

FILE = "control.json"
_MOST_BYTES = 4096
_Stamp = tuple[int, int, int]


class ControlFile:
    """Reads the file when it has changed. What is there already is of an earlier run, and is not read.

    Args:
        path: of the file.
        note: says a line.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self._path, self._note = path, note
        self._seen = self._stamp()
        if self._seen:
            note(f"{path} was there before this run and is not read until it changes")

    def read(self, check: Callable[[str], object]) -> str | None:
        """The action that it asks for, where it has changed since; a file that asks for none is told of once.

        Args:
            check: raises ValueError about an action that cannot be asked for.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            return None
        self._seen = stamp
        if stamp is None:
            return None
        try:
            action = self._action()
            check(action)
            return action
        except (OSError, ValueError) as error:
            self._note(f'{self._path} is ignored: {error} Write {{"action": "observe"}} or the like')
            return None

    def _action(self) -> str:
        with self._path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise ValueError(f"it is longer than {_MOST_BYTES} bytes.")
        try:
            asked = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is no JSON ({error}).") from None
        if not isinstance(asked, dict) or asked.keys() != {"action"} or not isinstance(asked["action"], str):
            raise ValueError(f"got {json.dumps(asked)[:200]}, and the one key allowed is action, a text.")
        return asked["action"]

    def _stamp(self) -> _Stamp | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
