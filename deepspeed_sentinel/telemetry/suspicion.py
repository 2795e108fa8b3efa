"""Why a worker is a suspect from a step on: each cause that a record knows of, in a few words that follow its name."""

from __future__ import annotations

from deepspeed_sentinel.judgement.unsettled import at_odds
from deepspeed_sentinel.judgement.verdict import Finding, Verdict
from deepspeed_sentinel.mesh import DIRECTIONS, Worker

_OF_ONE_STATISTIC = {
    "passed_on": "it sent over link {link} other tensors than entered it, of those that it always passed on unchanged",
    "from_nothing": "it sent over link {link} a gradient that it made from one that was zero",
    "non_finite": "its {way} messages over link {link} have NaN or infinite values",
}


def suspicion(verdict: Verdict, worker: Worker) -> str:
    """What makes a worker a suspect that was none before the step of a verdict."""
    for finding in verdict.findings:
        if finding.worker == worker and finding.strikes:
            return _sent(finding)
    for dispute in verdict.disputed:
        if dispute.struck == worker and dispute.about:
            return f"it gave an auditor a false statement of what it reported beside {dispute.about}"
    partners = [one if other == worker else other for one, other in verdict.unsettled if worker in (one, other)]
    if partners:
        stage = min((one.stage for one in partners), key=lambda stage: abs(stage - worker.stage))
        seen = at_odds(worker, [one for one in partners if one.stage == stage], "it")
        return f"{seen}, and nobody can tell who is wrong"
    if worker in verdict.released:
        return "its conviction ran out, so it is tried once more"
    # Nothing of this step: it was read from a checkpoint.
    return "it was one in the state that was taken over"


def _sent(finding: Finding) -> str:
    way, link = DIRECTIONS[finding.direction], finding.link
    if finding.statistic in _OF_ONE_STATISTIC:
        return _OF_ONE_STATISTIC[finding.statistic].format(way=way, link=link)
    measured = f"({finding.statistic}, score {finding.score:.3g})"
    if finding.cause == "sums":
        return f"deviations of its {way} messages over link {link} have added up {measured}"
    if finding.cause == "later alarms":
        return f"alarms behind it are traced back to its {way} messages over link {link} {measured}"
    return f"its {way} messages over link {link} lie outside the fences {measured}"
