"""Counting: who is malicious, who is blamed, what is false."""

from types import SimpleNamespace

import numpy as np

from deepspeed_sentinel.mesh import Mesh, Worker
from deepspeed_sentinel.simulation.metrics import Tally

MESH = Mesh(4, 3)
SERVED = np.tile(np.arange(3), (4, 1))


def verdict(step, blamed=(), convicted=(), judged=36):
    """``blamed``: (worker, number of messages)."""
    mask = np.zeros((4, 3), bool)
    for worker in convicted:
        mask[worker] = True
    return SimpleNamespace(
        step=step,
        judged=judged,
        scores=np.zeros((2, 3, 3, 2)),
        findings=[
            SimpleNamespace(worker=Worker(*w), direction=0, link=w[0], column=w[1], micro_batches=tuple(range(n)))
            for w, n in blamed
        ],
        convicted=mask,
        newly_convicted=tuple(Worker(*worker) for worker in convicted),
        skip=False,
        excluded=np.zeros(3, bool),
        disputed=(),
        proofs=(),
        cleared=(),
        twins=False,
    )


def acted(**steps):
    first = np.full((4, 3), -1)
    for at, step in steps.items():
        first[int(at[1]), int(at[2])] = step
    return first


def test_a_run_is_counted():
    tally = Tally(MESH)
    first = acted(w10=2, w21=3, w12=3)
    tally.add(verdict(0, judged=0), SERVED, np.zeros((4, 3), bool))
    tally.add(verdict(1, [((1, 0), 2)]), SERVED, np.zeros((4, 3), bool))
    malicious = first >= 0
    tally.add(verdict(4, [((1, 0), 1), ((2, 2), 2)], [(1, 0)]), SERVED, malicious)
    tally.add(verdict(9, [((2, 1), 2), ((1, 0), 1)], [(2, 1), (2, 2)]), SERVED, malicious)
    result = tally.result(first)
    assert result["malicious"] == [[1, 0], [1, 2], [2, 1]]
    assert result["convicted"] == [[1, 0], [2, 1], [2, 2]], "a released worker was convicted all the same"
    assert (result["precision"], result["recall"], result["f1"]) == (2 / 3, 2 / 3, 2 / 3)
    assert (result["detection_steps_mean"], result["detection_steps_max"]) == (4.0, 6)
    assert result["false_alarms"] == 4, "before it acts a worker is honest"
    assert result["false_convictions"] == 1
    assert result["judged_messages"] == 3 * 36
    # Two middle stages send both ways, the ends one way; three malicious workers send both ways, two messages each.
    assert result["false_alarm_rate"] == 4 / (3 * 36 - 2 * 3 * 2 * 2)


def test_nothing_to_divide_by_is_null():
    result = Tally(MESH).result(acted())
    assert all(result[name] is None for name in ("precision", "recall", "f1", "false_alarm_rate"))
    assert result["detection_steps_mean"] is None and result["detection_steps_max"] is None


def test_nobody_found():
    result = Tally(MESH).result(acted(w10=0))
    assert (result["precision"], result["recall"], result["f1"]) == (None, 0.0, 0.0)


def test_messages_are_right_wrong_or_missed_and_what_follows_a_blamed_one_is_neither():
    """Stage 1 changes micro-batch 0 of two columns, of which one is blamed; stage 2 changes what follows that one."""
    tally = Tally(MESH)
    altered = {(0, 1, 0, 0), (0, 1, 1, 0), (0, 2, 0, 0), (1, 2, 0, 0)}
    tally.add(verdict(1, [((1, 0), 1), ((2, 2), 2)]), SERVED, np.zeros((4, 3), bool), altered)
    assert tally.messages() == {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / (2 + 2 + 1)}
    assert Tally(MESH).messages() == {"precision": None, "recall": None, "f1": None}


def test_what_healing_took_is_counted_from_the_first_change_to_the_latest_conviction():
    tally, malicious = Tally(MESH), np.zeros((4, 3), bool)
    malicious[1, 0] = True
    for step in range(10):
        one = verdict(step, convicted=[(1, 0)] if step == 6 else [])
        one.excluded = np.array([step in (1, 4, 5, 6, 8), step == 5, step == 5])
        one.skip = step == 5
        tally.add(one, SERVED, malicious & (step >= 4))
        assert (tally.until_healed is None) == (step < 6)
    assert tally.until_healed == {"steps": 3, "skipped_steps": 1, "lost_columns": 5}
    assert tally.excluded_columns == 7
