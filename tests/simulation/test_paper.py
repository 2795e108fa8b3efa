"""The published procedure: its fences, what it learns from, whom it bans, and that it finds what it should."""

import numpy as np
import pytest

from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import NAMES, TABLE
from deepspeed_sentinel.kernels.baseline_distances import DISTANCES
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh
from deepspeed_sentinel.simulation.paper import VIOLATIONS, PaperJudge
from deepspeed_sentinel.simulation.run import Simulation

MESH = Mesh(4, 5)
ROWS = [NAMES.index(name) for name in DISTANCES]


def evidence(step, change=None, scale=1.0):
    """Distances of honest messages, gamma distributed as norms are; ``change(distances)`` alters [4, 2, L, C, M]."""
    statistics = np.full((2, 2, MESH.links, 5, 2, len(TABLE)), np.nan)
    distances = scale * np.random.default_rng(step).gamma(20.0, 0.05, (4, 2, MESH.links, 5, 2))
    if change is not None:
        change(distances)
    statistics[..., ROWS] = np.moveaxis(distances, 0, -1)
    return Evidence(MESH, step, statistics, np.zeros((2, 2, MESH.links, 5, 2, 1), np.int64))


def taught(steps=200, judged=(True, True)):
    judge = PaperJudge(MESH, steps, judged)
    for step in range(steps):
        verdict = judge.step(evidence(step))
        assert verdict.warming_up and not verdict.excluded.any() and verdict.judged == 0
    return judge


def far(direction, link, column, row=1, by=5.0):
    def change(distances):
        distances[row, direction, link, column, 1] = by

    return change


def test_fewer_than_one_in_a_hundred_honest_messages_is_flagged():
    judge = taught()
    flagged = judged = 0
    for step in range(200, 400):
        verdict = judge.step(evidence(step))
        flagged += sum(len(finding.micro_batches) for finding in verdict.findings)
        judged += verdict.judged
    assert 0.001 < flagged / judged < 0.01
    assert not judge.record.convicted.any()


@pytest.mark.parametrize("by", [5.0, 0.01, float("nan"), float("inf")])
def test_a_message_far_from_the_average_or_too_close_is_flagged_and_its_column_left_out(by):
    verdict = taught().step(evidence(200, far(FORWARD, 1, 3, by=by)))
    (finding,) = [one for one in verdict.findings if one.column == 3]
    assert (finding.worker, finding.link, finding.micro_batches) == ((1, 3), 1, (1,))
    assert finding.statistic == DISTANCES[1] and verdict.excluded[3]


def test_what_follows_a_flagged_message_is_not_judged_and_neither_is_learnt_from():
    judge = taught()

    def change(distances):
        distances[:, FORWARD, 1, 3, 1] = distances[:, FORWARD, 2, 3, 1] = distances[:, BACKWARD, 0, 3, 1] = 9.0

    verdict = judge.step(evidence(200, change))
    assert [(one.direction, one.link) for one in verdict.findings if one.column == 3] == [(FORWARD, 1)]
    learnt = judge.clean_links[:, :, 3]
    assert learnt.tolist() == [[True, False, False], [False, False, False]]
    assert np.nanmax(judge._recent) < 9.0


def test_fences_follow_what_is_not_flagged():
    """Honest distances double within 300 steps; the fences of the first steps would flag nearly all of them."""
    judge, flagged = taught(), 0.0
    for step in range(200, 500):
        flagged += judge.step(evidence(step, scale=1 + (step - 200) / 300)).alarms.mean() / 300
    assert flagged < 0.1
    assert taught().step(evidence(500, scale=2.0)).alarms.mean() > 0.9


def test_one_direction_alone_is_judged():
    judge = taught(judged=(True, False))
    verdict = judge.step(evidence(200, far(BACKWARD, 1, 3)))
    assert all(one.direction == FORWARD for one in verdict.findings) and not verdict.alarms[BACKWARD].any()
    assert judge.step(evidence(201, far(FORWARD, 1, 3))).excluded[3]


def test_repeated_violations_ban_for_good_and_the_ends_are_trusted():
    judge = taught()
    for step in range(200, 200 + VIOLATIONS):
        assert not judge.record.convicted.any()
        verdict = judge.step(evidence(step, far(FORWARD, step % 2, 3)))
        verdict = judge.step(evidence(step, far(FORWARD, 1, 3)))
        verdict = judge.step(evidence(step, far(FORWARD, 0, 2)))
        if judge.record.convicted.any():
            break
    assert np.argwhere(verdict.convicted).tolist() == [[1, 3]]
    for step in range(230, 500):
        verdict = judge.step(evidence(step))
    assert verdict.convicted[1, 3]


def test_a_constant_activation_is_found_and_attacks_must_wait_for_the_honest_steps(options):
    some = {"attack": "constant", "procedure": "paper", "direction": "forward", "stages": 4, "replicas": 4}
    result = Simulation(options(**some, honest_steps=10, start=10, steps=25)).run()
    assert result["recall"] == 1.0 and result["details"]["messages"]["recall"] > 0.9
    assert result["details"]["procedure"] == "paper"
    with pytest.raises(ValueError, match="must not be below honest_steps"):
        options(**some)
