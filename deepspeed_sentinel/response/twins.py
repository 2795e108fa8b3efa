"""Which steps are twin steps: drawn from a secret, one step at a time, so that nobody who lacks it can foresee any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepspeed_sentinel.config import SentinelConfig


@dataclass(frozen=True)
class Draw:
    """What is drawn for a twin step.

    Attributes:
        source: the replica whose micro-batches are given to others.
        given: bool [C], the columns that get them, its own among them.
    """

    source: int
    given: np.ndarray


def chance(config: SentinelConfig, replicas: int, suspicion: float) -> float:
    """How likely a step is a twin step, as everybody knows beforehand.

    Args:
        config: how often.
        replicas: how many there are.
        suspicion: how likely a twin step is for it, see ``Record.suspicion``.
    """
    if replicas < 2:
        return 0.0
    at_random = 1.0 / config.twins.every if config.twins.every else 0.0
    return max(at_random, suspicion if config.tries_suspects else 0.0)


def draw(config: SentinelConfig, replicas: int, suspicion: float, secret: int) -> Draw | None:
    """What a step is: a twin step, or None for any other.

    Args:
        config, replicas, suspicion: as of ``chance``.
        secret: a number of this one step, below 2^64.
    """
    generator = np.random.default_rng(secret)
    if generator.random() >= chance(config, replicas, suspicion):
        return None
    order = generator.permutation(replicas)
    given = np.zeros(replicas, bool)
    given[order[: replicas if config.twins.columns == "all" else config.twins.columns]] = True
    return Draw(int(order[0]), given)
