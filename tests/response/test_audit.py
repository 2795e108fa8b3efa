from dataclasses import replace

import numpy as np
import pytest
from accusation import ACCUSED, COLUMN, CPU, LAYOUT, MESH, Case, finding, verdict

from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.evidence.transfer import Known
from deepspeed_sentinel.judgement.account import entries
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh, Worker
from deepspeed_sentinel.response.audit import Outcome, audits_due, examine, rule

DIRECTIONS = pytest.mark.parametrize("direction", [FORWARD, BACKWARD])


def outcome(case, first=None, second=None, **changes):
    (audit,) = audits_due(verdict(finding(case.direction, **changes)), case.evidence)
    return examine(audit, case.evidence, first or case.first, second or case.second, LAYOUT, CPU)


@DIRECTIONS
@pytest.mark.parametrize("tokens", [40, 400])
def test_a_true_row_confirms(direction, tokens):
    assert outcome(Case(direction, tokens=tokens)) is Outcome.CONFIRMED


@DIRECTIONS
@pytest.mark.parametrize("forged", [-1.0, 1.1])
def test_a_row_of_another_message_is_refuted(direction, forged):
    case = Case(direction, forged=forged)
    assert outcome(case) is Outcome.REFUTED
    assert outcome(case, telling=()) is Outcome.REFUTED, "a lie is one, whatever it was good for"


@DIRECTIONS
def test_a_message_without_the_checksum_that_both_ends_reported_names_its_witness(direction):
    case = Case(direction)
    for part in (0, 1):
        tensors = list(case.second.tensors)
        tensors[part] = tensors[part] + 1
        assert outcome(case, second=replace(case.second, tensors=tuple(tensors))) is Outcome.SECOND_FALSE
    assert outcome(case, first=replace(case.first, tensors=())) is Outcome.FIRST_FALSE
    negative = replace(case.second, tensors=(-case.second.tensors[0], *case.second.tensors[1:]))
    assert outcome(case, second=negative) is Outcome.SECOND_FALSE
    not_a_number = replace(case.first, tensors=(case.first.tensors[0] * float("nan"), *case.first.tensors[1:]))
    assert outcome(case, first=not_a_number) is Outcome.FIRST_FALSE


def test_where_the_two_ends_of_a_link_disagree_there_is_nothing_to_hold_a_message_against():
    case = Case()
    case.evidence.digests[SENT, FORWARD, 1, COLUMN] += 1
    assert outcome(case) is Outcome.OPEN


def test_a_micro_batch_that_is_not_itself_in_alarm_leaves_it_open():
    assert outcome(Case(kept=1), telling=(0, 2, 3)) is Outcome.OPEN
    assert outcome(Case(kept=2), telling=(0, 2, 3)) is Outcome.CONFIRMED


def test_neighbours_that_name_different_seeds_micro_batches_or_maps_are_refuted():
    case = Case()
    (known,) = case.second.known
    for changes in (
        {"seeds": (11, 14, 13)},
        {"seeds": (11, 12, 14)},
        {"micro_batch": 2},
        {"known": (None,)},
        {"known": (Known(known.expected_K, 1.1 * known.w_KK),)},
        {"known": (Known(known.expected_K[:3], known.w_KK),)},
        {"known": (Known(known.expected_K * float("nan"), known.w_KK),)},
    ):
        assert outcome(case, second=replace(case.second, **changes)) is Outcome.REFUTED, changes


def test_what_no_message_of_the_step_can_be_names_its_witness():
    case = Case()
    assert outcome(case, second=replace(case.second, known=2 * case.second.known)) is Outcome.SECOND_FALSE
    assert outcome(case, second=replace(case.second, known=())) is Outcome.SECOND_FALSE
    assert outcome(case, first=replace(case.first, micro_batch=9)) is Outcome.FIRST_FALSE


def test_rounding_is_no_lie():
    case = Case()
    case.evidence.statistics[RECEIVED] *= 1 + 1e-6
    (known,) = case.second.known
    rounded = replace(case.second, known=(Known(known.expected_K + 1e-6, known.w_KK * (1 - 1e-4)),))
    assert outcome(case, second=rounded) is Outcome.CONFIRMED


def test_what_is_not_known_yet_must_be_missing_in_the_evidence_too():
    case = Case()
    first, second = (replace(each, known=(None,)) for each in (case.first, case.second))
    assert outcome(case, first, second) is Outcome.REFUTED
    case.evidence.statistics[..., [10, 12, 13]] = float("nan")
    assert outcome(case, first, second) is Outcome.CONFIRMED


def test_each_neighbour_answers_for_the_row_that_it_reports():
    for end in (SENT, RECEIVED):
        case = Case()
        case.evidence.statistics[end, FORWARD, 2, COLUMN, 1, 7] -= 0.1
        assert outcome(case) is Outcome.REFUTED


@DIRECTIONS
def test_the_neighbours_in_the_column_testify_to_the_nearer_trusted_worker(direction):
    evidence = Case().evidence
    (audit,) = audits_due(verdict(finding(direction)), evidence)
    below, above = Worker(1, COLUMN), Worker(3, COLUMN)
    assert (audit.first, audit.second) == ((below, above) if direction == FORWARD else (above, below))
    assert audit.auditor == Worker(0, COLUMN)
    upper = finding(direction, worker=Worker(3, COLUMN), link=3 if direction == FORWARD else 2)
    (audit,) = audits_due(verdict(upper), evidence)
    assert audit.auditor == Worker(4, COLUMN) and audit.auditor in (audit.first, audit.second)


def test_no_audit_where_nothing_hangs_on_it():
    evidence = Case().evidence
    assert not audits_due(verdict(finding(), convicted=[ACCUSED]), evidence)
    assert audits_due(verdict(finding(), newly=[ACCUSED]), evidence)
    assert not audits_due(verdict(finding(rests_on_pair=False)), evidence)
    assert not audits_due(verdict(finding(), finding(BACKWARD, rests_on_pair=False)), evidence)
    overflow = finding(BACKWARD, rests_on_pair=False, overflow=True, striking=())
    assert not audits_due(verdict(finding(striking=())), evidence)
    assert [audit.finding for audit in audits_due(verdict(overflow, finding()), evidence)] == [finding()]
    assert not audits_due(verdict(overflow), evidence)
    assert not audits_due(verdict(finding(worker=Worker(0, 1), trusted=True)), evidence)
    assert Mesh(3, 2).neighbours_are_trusted(1) and not MESH.neighbours_are_trusted(1)


def test_at_most_one_audit_a_worker_and_of_its_worst_finding():
    worst, other = finding(score=9.0), finding(BACKWARD, score=2.0)
    neighbour = finding(worker=Worker(2, 0), column=0)
    audits = audits_due(verdict(worst, neighbour, other), Case().evidence)
    assert [audit.finding for audit in audits] == [worst, neighbour]


def test_a_ruling_confirms_opens_or_turns_into_disputes_all_that_rests_on_the_pair():
    worst, other, stranger = finding(score=9.0), finding(BACKWARD), finding(worker=Worker(1, 0), rests_on_pair=False)
    said = verdict(worst, other, stranger)
    audits = audits_due(said, Case().evidence)

    confirmed = rule(said, audits, [Outcome.CONFIRMED])
    assert [one.audit for one in confirmed.verdict.findings] == ["confirmed", "", ""]
    assert not confirmed.opened and not confirmed.refuted and not confirmed.verdict.disputed

    opened = rule(said, audits, [Outcome.OPEN])
    assert [one.audit for one in opened.verdict.findings] == ["open", "open", ""]
    assert opened.opened == opened.verdict.findings[:2] and "no strike" in str(opened.opened[0])

    refuted = rule(said, audits, [Outcome.REFUTED])
    assert refuted.verdict.findings == (stranger,) and refuted.refuted == (worst, other)
    forward, backward = refuted.verdict.disputed
    assert (forward.sender, forward.receiver, forward.about) == (Worker(1, 1), Worker(3, 1), ACCUSED)
    assert (backward.sender, backward.receiver, backward.about) == (Worker(3, 1), Worker(1, 1), ACCUSED)
    assert forward.audit == "refuted" and "audit refuted" in str(forward)
    assert forward.at_fault is None and forward.struck is None


@pytest.mark.parametrize(
    ("outcome", "who", "told"),
    [
        (Outcome.FIRST_FALSE, Worker(1, 1), "a false statement"),
        (Outcome.SECOND_FALSE, Worker(3, 1), "a false statement"),
        (Outcome.FIRST_UNHEARD, Worker(1, 1), "nothing in time"),
        (Outcome.SECOND_UNHEARD, Worker(3, 1), "nothing in time"),
    ],
)
def test_a_ruling_names_the_witness_at_fault_and_strikes_it_only_for_what_is_proven(outcome, who, told):
    worst, other = finding(score=9.0), finding(BACKWARD)
    said = verdict(worst, other)
    ruling = rule(said, audits_due(said, Case().evidence), [outcome])
    assert not ruling.verdict.findings and ruling.refuted == (worst, other)
    for dispute in ruling.verdict.disputed:
        assert dispute.at_fault == who and dispute.about == ACCUSED
        assert dispute.struck == (who if "false" in told else None)
        assert str(dispute).startswith(f"{who} gave the auditor {told}")
    struck, disputed = entries(MESH, (), ruling.verdict.disputed)
    assert np.argwhere(struck).tolist() == ([list(who)] if "false" in told else [])
    assert disputed[[1, 2], COLUMN].all()


@pytest.mark.parametrize(
    ("outcome", "content"), [(Outcome.REFUTED, True), (Outcome.SECOND_FALSE, True), (Outcome.CONFIRMED, False)]
)
def test_what_content_would_explain_but_for_a_lie_about_the_pair_is_content_again(outcome, content):
    said = verdict(finding(but_for_pair=True, statistic="energy"))
    ruling = rule(said, audits_due(said, Case().evidence), [outcome])
    (left,) = ruling.verdict.findings
    assert left.strikes != content and ("content" in str(left)) == content
    assert bool(ruling.verdict.disputed) == bool(ruling.refuted) == content
