"""What is held against a worker on resuming belongs to the device that it ran on."""

import numpy as np
import pytest

from deepspeed_sentinel.engine.placement import elsewhere, placement
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.devices import BYTES, NOBODY, Device

DEVICES = [[Device(f"node-{stage}", replica, f"uuid-{stage}{replica}") for replica in range(2)] for stage in range(3)]


def other(worker, device):
    devices = [list(of_stage) for of_stage in DEVICES]
    devices[worker.stage][worker.replica] = device
    return devices


def test_another_device_in_a_place_is_seen():
    then = placement(DEVICES)
    assert then.shape == (3, 2, BYTES)
    assert elsewhere(then, DEVICES) == ()
    assert elsewhere(then, other((worker := Worker(1, 1)), Device("node-1", 1, "uuid-new"))) == (worker,)
    assert elsewhere(then, other(worker, Device("node-7", 5, "uuid-11"))) == (), "the same GPU in another host"
    swapped = [DEVICES[0], DEVICES[1][::-1], DEVICES[2]]
    assert elsewhere(then, swapped) == (Worker(1, 0), Worker(1, 1))


def test_who_gave_no_name_then_or_now_is_nobody_else():
    worker = Worker(2, 0)
    assert elsewhere(placement(DEVICES), other(worker, NOBODY)) == ()
    assert elsewhere(placement(other(worker, NOBODY)), DEVICES) == ()


@pytest.mark.parametrize("said", [None, "text", np.zeros((3, 2, 5), np.uint8), np.zeros((3, 2, BYTES))])
def test_what_is_no_placement_moves_nobody(said):
    assert elsewhere(said, DEVICES) == ()


def test_bytes_of_a_stranger_are_nobody():
    then = placement(DEVICES)
    then[1, 1] = 255
    assert elsewhere(then, DEVICES) == ()
