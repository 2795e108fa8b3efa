"""Where a rank is in its training: written by its main thread at each instruction, told by its heart to the others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.pipe import schedule

# Within one call of ``train_batch`` or ``eval_batch`` every rank passes these one after another.
BEGIN, PIPELINE, TIED, REDUCE, STEP, END, OUTSIDE = range(7)
_STAGES_OF_A_CALL = {
    schedule.ReduceTiedGrads: TIED,
    schedule.ReduceGrads: REDUCE,
    schedule.OptimizerStep: STEP,
}


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        moves: how often it has moved; the same number means that it stands still.
        call: how many calls of ``train_batch`` and ``eval_batch`` it has entered.
        phase: which of the phases of a call, from BEGIN to OUTSIDE.
        step: the global step.
        what: the instruction's name, or a word for where else it is.
    """

    moves: int
    call: int
    phase: int
    step: int
    what: str

    def __str__(self) -> str:
        return f"{self.what} of step {self.step}"

    def to_text(self) -> str:
        return f"{self.moves} {self.call} {self.phase} {self.step} {self.what}"

    @staticmethod
    def from_text(text: str) -> Place:
        """Raises ValueError."""
        moves, call, phase, step, what = text.split(" ", 4)
        return Place(int(moves), int(call), int(phase), int(step), what)


class Progress:
    """Keeps the place of this rank.

    Args:
        step: the global step.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        self._step = step
        self.place = Place(0, 0, OUTSIDE, 0, "the script's own code")

    def enter(self) -> None:
        """A call of ``train_batch`` or ``eval_batch`` begins."""
        self._move(BEGIN, "the beginning", self.place.call + 1)

    def end_schedule(self) -> None:
        """Its instructions are done: what is left is the loss."""
        self._move(END, "the averaging of losses")

    def leave(self) -> None:
        self._move(OUTSIDE, "the script's own code")

    def tracked(self, instructions: Mapping[type, Callable[..., Any]]) -> dict[type, Callable[..., Any]]:
        """The entries of an engine's ``_INSTRUCTION_MAP``, each of which says so when it begins."""
        return {instruction: self._tracked(instruction, run) for instruction, run in instructions.items()}

    def _tracked(self, instruction: type, run: Callable[..., Any]) -> Callable[..., Any]:
        phase, name = _STAGES_OF_A_CALL.get(instruction, PIPELINE), instruction.__name__

        @functools.wraps(run)
        def in_its_place(*args: Any, **kwargs: Any) -> Any:
            self._move(phase, name)
            return run(*args, **kwargs)

        return in_its_place

    def _move(self, phase: int, what: str, call: int | None = None) -> None:
        before = self.place
        self.place = Place(before.moves + 1, before.call if call is None else call, phase, self._step(), what)
