"""Random numbers of a step in which replicas may be held against each other.

What a worker sends depends on the numbers that its dropout, jitter or noise draws. Replicas of a stage need not draw
the same: their seeds may differ, and a worker that once drew one number more or less than the others, since its data
were others, differs from them for good. So in a step that may be a twin step all generators that torch, DeepSpeed,
Python and numpy keep for everybody begin with what the stage's secret (``evidence/stage_secret.py``) makes of the step,
and go on afterwards from where they were. First and last stage load data, for which a replica may want numbers of its
own: there it is so in twin steps alone, after their micro-batches are drawn.

A generator of the model's own is not known.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

from deepspeed_sentinel.evidence.keys import Secret

_OF_NUMPY = 1 << 32  # seeds that it takes


@dataclass(frozen=True)
class RandomState:
    """Where everybody's generators stand. Taking and setting it does not wait for the device."""

    of_torch: torch.Tensor
    of_device: torch.Tensor
    of_deepspeed: dict[str, torch.Tensor]
    of_python: Any
    of_numpy: Any

    @classmethod
    def now(cls) -> RandomState:
        return cls(
            torch.get_rng_state(),
            get_accelerator().get_rng_state(),
            get_cuda_rng_tracker().get_states(),
            random.getstate(),
            np.random.get_state(),  # noqa: NPY002
        )

    def put_back(self) -> None:
        torch.set_rng_state(self.of_torch)
        get_accelerator().set_rng_state(self.of_device)
        tracker = get_cuda_rng_tracker()
        tracker.set_states({**tracker.get_states(), **self.of_deepspeed})  # some may have come since
        random.setstate(self.of_python)
        np.random.set_state(self.of_numpy)  # noqa: NPY002


class StepRandomness:
    """Has a stage draw the same random numbers in all its columns for the length of a step.

    Args:
        secret: of the stage.
    """

    def __init__(self, secret: Secret) -> None:
        self._secret = secret
        self._before: RandomState | None = None

    def begin_step(self, step: int, same: bool) -> None:
        """Before the first forward pass.

        Args:
            step: the engine's global step.
            same: whether numbers are to be those of all the stage's columns.
        """
        if not same:
            return
        self._before = RandomState.now()
        seed = self._secret.number("random numbers", step)
        tracked = {}
        for index, name in enumerate(sorted(self._before.of_deepspeed)):
            _seed(seed + 1 + index)
            tracked[name] = get_accelerator().get_rng_state()
        get_cuda_rng_tracker().set_states(tracked)
        _seed(seed)
        random.seed(seed)
        np.random.seed(seed % _OF_NUMPY)  # noqa: NPY002

    def end_step(self) -> None:
        """After the last backward pass: go on from where generators were."""
        if self._before is not None:
            self._before.put_back()
            self._before = None


def _seed(seed: int) -> None:
    """Torch's generators of the CPU and of this rank's device alone."""
    torch.default_generator.manual_seed(seed)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().manual_seed(seed)
