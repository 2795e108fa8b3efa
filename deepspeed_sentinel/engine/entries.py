"""Sentinel's own entries in an engine's table of instructions, and whether another tool has taken their place.

Whoever wraps an entry and calls it does no harm. Whoever puts its own there instead takes the guard away without a
word: of ``OptimizerStep`` it would apply what was to be kept out of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.runtime.pipe import schedule

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.telemetry import console


class Entries:
    """The entries of one engine.

    Args:
        instructions: what is to be run in place of which kinds of instruction.

    Attributes:
        instructions: the same, for an engine's ``_INSTRUCTION_MAP``.
    """

    def __init__(self, instructions: Mapping[type, Callable[..., Any]]) -> None:
        self._reached: set[type] = set()
        self._due: set[type] | None = None  # the same in all schedules of a worker
        self._told = False
        self.instructions = {kind: self._noted(kind, run) for kind, run in instructions.items()}

    def begin(self) -> None:
        """Before a schedule."""
        self._reached.clear()

    def check(self, pipe_schedule: schedule.PipeSchedule, *, lenient: bool) -> None:
        """After a schedule.

        Args:
            pipe_schedule: of a training step.
            lenient: say what is wrong, once, and let it pass.

        Raises:
            SentinelError: it had instructions whose entry was not called.
        """
        if self._due is None:
            kinds = {type(instruction) for instructions in pipe_schedule.steps() for instruction in instructions}
            self._due = kinds & self.instructions.keys()
        if missed := sorted(kind.__name__ for kind in self._due - self._reached):
            problem = (
                f"another tool has put its own entry for {', '.join(missed)} into the engine's instructions, so this "
                "step was not guarded. Let that tool attach first, and Sentinel after it: leave "
                '"sentinel" out of the DeepSpeed config and call deepspeed_sentinel.attach(engine, {...}) last.'
            )
            if not lenient:
                raise SentinelError(problem)
            if not self._told:
                console.say(problem)
            self._told = True

    def _noted(self, kind: type, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self._reached.add(kind)
            return run(*args, **kwargs)

        return noted
