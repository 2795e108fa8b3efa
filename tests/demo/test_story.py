"""The demo's story of a run: whole, short, and in the order in which things happen."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import CULPRIT, blamed

from deepspeed_sentinel.demo.story import Story
from deepspeed_sentinel.judgement.trial import Difference, Proof
from deepspeed_sentinel.judgement.unsettled import Contradicted
from deepspeed_sentinel.judgement.verdict import Dispute
from deepspeed_sentinel.mesh import FORWARD, Mesh, Worker, identity

OWN = identity(Mesh(4, 3))
PACKED = OWN.copy()
PACKED[1] = [2, 1, 0]
PEER = Worker(1, 0)
PROOF = Proof(CULPRIT, 2, FORWARD, (0,), 2, 3, trusted=False)


def marked(*workers):
    mask = np.zeros((4, 3), bool)
    for worker in workers:
        mask[worker] = True
    return mask


def out(*columns):
    excluded = np.zeros(3, bool)
    excluded[list(columns)] = True
    return excluded


def quiet(**more):
    nothing = {"findings": (), "disputed": (), "suspects": marked(), "excluded": out(), "action": "quarantine"}
    return replace(blamed(), **{**nothing, **more})


def told(*steps):
    """Of verdicts, or of verdicts and the wirings that they went by, the lines of the last."""
    story = Story()
    for step in steps:
        lines = story.step(*step) if isinstance(step, tuple) else story.step(step, OWN)
    return lines


def test_a_run_is_told_from_the_alarm_to_how_it_goes_on():
    score = f"{blamed().findings[0].score:.3g}"
    proved = quiet(
        twins=True, proofs=(PROOF,), newly_convicted=(CULPRIT,), convicted=marked(CULPRIT), excluded=out(0),
        cleared=(PEER,),
    )  # fmt: skip
    steps = [(quiet(), OWN), (replace(blamed(), action="quarantine"), OWN), (quiet(excluded=out(0)), PACKED)]
    steps += [(proved, PACKED), (quiet(convicted=marked(CULPRIT), excluded=out(0)), PACKED)]
    story = Story()
    assert [story.step(*step) for step in steps] == [
        [],
        [
            f"ALARM stage 1 replica 2 score {score} (fence at 1)",
            "LEFT OUT of the weights: column 2; columns 0, 1 go on",
            "SUSPECT stage 1 replica 2: its forward messages over link 1 lie outside the fences "
            f"(energy, score {score})",
        ],
        [
            "DEALT ANEW stage 1: replica 0 to column 2, replica 2 to column 0",
            "LEFT OUT of the weights: column 0; columns 1, 2 go on",
        ],
        [
            "TWIN STEP: all columns get the same data and are compared",
            "PROVED stage 1 replica 2: other forward messages than 2 of 3 given the same",
            "CLEARED stage 1 replica 0: given the same, it does what its stage does",
            "CONVICTED stage 1 replica 2, proved: its column stays out, training goes on",
        ],
        [],
    ]


def test_what_a_convicted_worker_goes_on_doing_is_not_told():
    assert blamed().findings
    convicted = quiet(convicted=marked(CULPRIT), newly_convicted=(CULPRIT,))
    dispute = Dispute(FORWARD, 1, 2, CULPRIT, Worker(2, 2), None, (0,))
    goes_on = replace(blamed(), proofs=(PROOF,), disputed=(dispute,), convicted=marked(CULPRIT), suspects=marked())
    assert told(convicted, goes_on) == ["LEFT OUT of the weights: column 2; columns 0, 1 go on"]


def test_a_step_of_which_nothing_is_left_says_why_it_is_skipped():
    lines = told(quiet(), quiet(excluded=out(0, 1, 2), skip=True), quiet(excluded=out(0, 1, 2), skip=True))
    assert lines == ["SKIPPED, no weight changes: every column is left out"]
    assert told(quiet(excluded=out(0, 1, 2), skip=True))[0] == "LEFT OUT of the weights: columns 0, 1, 2"
    assert told(quiet(skip=True)) == ["SKIPPED, no weight changes: not every message could be judged"]
    assert told(quiet(excluded=out(1)), quiet()) == ["ALL COLUMNS COUNT again"]
    assert told(quiet(excluded=out(0, 1))) == ["LEFT OUT of the weights: columns 0, 1; column 2 goes on"]


def test_who_is_undecided_or_at_odds_is_told_with_whom():
    other = Worker(1, 1)
    differing = quiet(
        twins=True,
        differences=(Difference((CULPRIT,), (2,), FORWARD),),
        suspects=marked(CULPRIT, PEER),
        unsettled=((PEER, CULPRIT),),
    )
    _, at_first, _, undecided = told(quiet(), differing)
    assert at_first.startswith(
        "SUSPECT stage 1 replica 0: given the same micro-batches, it made something else than stage 1 replica 2"
    )
    assert undecided == "UNDECIDED stage 1 replica 2: other work on the same, and no majority"
    odds = replace(
        differing, contradicted=(Contradicted(CULPRIT, (PEER, other)),), newly_convicted=(CULPRIT,), unsettled=()
    )
    lines = told(differing, replace(odds, suspects=marked(PEER), convicted=marked(CULPRIT)))
    assert lines[1:] == [
        "PROVED stage 1 replica 2: at odds with stage 1 replica 0 and stage 1 replica 1, more than can be bad",
        "CONVICTED stage 1 replica 2, proved: its column stays out, training goes on",
    ]


@pytest.mark.parametrize(("score", "shown"), [(np.inf, "over 999"), (1.26, "1.26"), (249.4, "249")])
def test_scores_are_short(score, shown):
    verdict = replace(blamed(), findings=(replace(blamed().findings[0], score=score),))
    assert f"ALARM stage 1 replica 2 score {shown} (fence at 1)" in told(verdict)[0]
