"""Which device was in which place when a checkpoint was made: what was held against it does not hold for another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.devices import BYTES, NOBODY, Device, from_bytes, to_bytes


def placement(devices: Sequence[Sequence[Device]]) -> np.ndarray:
    """uint8 [S, R, BYTES], for a checkpoint; zeros for who gave no name."""
    nobody = np.zeros(BYTES, np.uint8)
    return np.stack([np.stack([to_bytes(one) if one.host else nobody for one in of_stage]) for of_stage in devices])


def elsewhere(said: Any, devices: Sequence[Sequence[Device]]) -> tuple[Worker, ...]:
    """The workers whose place another device has now, by whatever a checkpoint holds as the placement then."""
    shape = (len(devices), len(devices[0]), BYTES)
    if not isinstance(said, np.ndarray) or said.dtype != np.uint8 or said.shape != shape:
        return ()
    return tuple(
        Worker(stage, replica)
        for stage, of_stage in enumerate(devices)
        for replica, now in enumerate(of_stage)
        if _read(said[stage, replica]).is_another(now)
    )


def _read(said: np.ndarray) -> Device:
    try:
        return from_bytes(said)
    except ValueError:
        return NOBODY
