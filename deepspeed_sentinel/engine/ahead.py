"""Micro-batches that are drawn before the engine asks for them, each a copy of its own.

A loader may fill the same memory again for the next one, and a loss may alter what it was given. What cannot be copied
is therefore the last that is drawn ahead: nothing can happen to it before the engine has it.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.overrides import TorchFunctionMode


class Ahead:
    """What one rank has drawn and not yet given to its engine.

    Attributes:
        waiting: it, in order.
        ended: what the loader raised in place of the next one, and is kept until it would have come; or None.
        uncopied: the last one that waits is the loader's own, since it cannot be copied.

    Args:
        engine: whose micro-batches.
        own_next: draws the next one.
    """

    def __init__(self, engine: PipelineEngine, own_next: Callable[[], Any]) -> None:
        self._engine, self._own_next = engine, own_next
        self._loader: Any = None
        self.waiting: deque[Any] = deque()
        self.ended: Exception | None = None
        self.uncopied = False

    @property
    def whole(self) -> bool:
        """All micro-batches of the step wait, each with its own memory."""
        return self.ended is None and not self.uncopied and len(self.waiting) == self._engine.micro_batches

    def forget(self) -> None:
        """Drop what waits."""
        self.waiting.clear()
        self.ended = self._loader = None
        self.uncopied = False

    def draw(self) -> None:
        """Draw all micro-batches of the step, or as many as can be drawn ahead."""
        self._loader = self._engine.data_iterator
        while len(self.waiting) < self._engine.micro_batches and self.ended is None and not self.uncopied:
            try:
                own = self._own_next()
            except Exception as error:
                self.ended = error
                return
            try:
                self.waiting.append(copied(own))
            except Exception:  # whatever its class raises
                self.waiting.append(own)
                self.uncopied = True

    def double(self) -> bool:
        """Have the micro-batches of the step wait once more behind themselves; False where that cannot be."""
        if not self.waiting and self.ended is None:
            self.draw()
        if not self.whole:
            return False
        try:
            again = [copied(batch) for batch in self.waiting]
        except Exception:
            return False
        self.waiting.extend(again)
        return True

    def halve(self) -> None:
        """Take back what ``double`` did, where it did."""
        while len(self.waiting) > self._engine.micro_batches:
            self.waiting.pop()

    def next_batch(self) -> Any:
        """What the engine is given next."""
        if self._engine.data_iterator is not self._loader:  # a step broke off, and the script goes on with other data
            self.forget()
        if self.waiting:
            return self.waiting.popleft()
        if self.ended is not None:
            ended, self.ended = self.ended, None
            raise ended
        return self._own_next()


def copied(batch: Any) -> Any:
    """A micro-batch with memory of its own, whatever holds it.

    Raises:
        Exception: any, where there is something that cannot be copied.
    """
    with _Clones():
        return copy.deepcopy(batch)


class _Clones(TorchFunctionMode):
    """Of a tensor that is copied, its elements alone: the memory that it is a view of may be a whole data set."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        clone = tensor.clone()
        for name, value in vars(tensor).items():
            setattr(clone, name, copy.deepcopy(value, memo))
        return clone
