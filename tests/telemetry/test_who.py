"""What a worker is called where people read of it."""

import numpy as np
import pytest

from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.devices import NOBODY, Device
from deepspeed_sentinel.telemetry.who import Place, Who

RANKS = np.array([[1, 0], [3, 7]])
UUID = "1a2b3c4d-64d7-4f0a-a1c9-b2570c9d8e44"
WHO = Who(
    RANKS, ((Device("node-01", 0, name="cpu"), NOBODY), (Device("n", 1), Device("node-03", 3, UUID, "", "cuda:3")))
)


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        ((1, 1), "stage 1, replica 1 (rank 7, node-03, cuda:3, GPU-1a2b3c4d)"),
        ((0, 0), "stage 0, replica 0 (rank 1, node-01, cpu)"),
        ((1, 0), "stage 1, replica 0 (rank 3, n)"),
        ((0, 1), "stage 0, replica 1 (rank 0)"),
    ],
)
def test_a_worker_is_named_as_far_as_it_said(worker, text):
    assert str(WHO(Worker(*worker))) == text
    assert WHO.fill(f"step 3: {Worker(*worker)}: {Worker(*worker)}.") == f"step 3: {text}: {text}."


def test_all_of_it_is_there_for_programs():
    assert WHO(Worker(1, 1)) == Place(1, 1, 7, 3, "node-03", "cuda:3", f"GPU-{UUID}")
    assert WHO(Worker(0, 1)) == Place(0, 1, 0, None, None, None, None)


def test_a_rank_before_a_worker_is_said_once_and_nothing_is_filled_twice():
    text = WHO.fill(f"lost rank 7 = {Worker(1, 1)}. Resume")
    assert text == "lost stage 1, replica 1 (rank 7, node-03, cuda:3, GPU-1a2b3c4d). Resume"
    assert WHO.fill(text) == text


def test_who_is_not_in_this_run_stays_as_it_is():
    assert WHO.fill(f"{Worker(2, 0)} and {Worker(0, 2)}") == f"{Worker(2, 0)} and {Worker(0, 2)}"
