"""Hooks of scenarios: one bit changes in what one worker holds, just before a step begins."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed_sentinel.engine import access
from deepspeed_sentinel.engine.replicated import replicated
from deepspeed_sentinel.mesh import Worker

EVERY = 3
AT, LATER, BETWEEN = EVERY, 2 * EVERY, EVERY + 1
IN_WEIGHTS = (Worker(0, 0), Worker(1, 2))  # the first replica of one stage, so that another one heals it
IN_STATE = Worker(1, 1)
LAST = Worker(1, 1)  # replica 1 in meshes of two replicas and of three


def flip(tensor: torch.Tensor) -> None:
    """Change the lowest bit of the first element in place, as a cosmic ray would."""
    octets = tensor.detach().view(-1)[:1].view(torch.uint8)
    octets[0] ^= 1


def _parameter(engine: Any) -> torch.Tensor:
    return next(iter(engine.module.parameters()))


def weights_then_state(engine: Any, step: int) -> None:
    """A weight of two workers before one comparison, the optimizer's state of a third before the next."""
    worker = access.worker_of(engine)
    if step == AT and worker in IN_WEIGHTS:
        flip(_parameter(engine))
    if step == LATER and worker == IN_STATE:
        flip(engine.optimizer.state[_parameter(engine)]["exp_avg"])


def after_load(engine: Any, step: int) -> None:
    """A weight of one worker before the first step that follows a checkpoint."""
    if step == LATER and access.worker_of(engine) == LAST:
        flip(_parameter(engine))


def between(engine: Any, step: int) -> None:
    """A weight of one worker, some steps before the next comparison."""
    if step == BETWEEN and access.worker_of(engine) == LAST:
        flip(_parameter(engine))


def each_kind(engine: Any, step: int) -> None:
    """The first of what replicas hold alike (a parameter) and the last (optimizer state where it is replicated)."""
    if step in (1, 2) and access.worker_of(engine) == LAST:
        flip(replicated(engine)[0 if step == 1 else -1])
