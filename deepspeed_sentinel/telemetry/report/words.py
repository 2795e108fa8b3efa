"""What was found of a worker, in words: the same on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed_sentinel.judgement.unsettled import Contradicted
from deepspeed_sentinel.mesh import NAMED, Worker
from deepspeed_sentinel.telemetry.report.reading import NOT_TOLD

MOST = 3  # of one sort; the others are counted
WHAT = {"forward": "forward messages", "backward": "backward messages", "gradients": "gradients of its weights"}
_MADE_OF = {"forward": "activations, ", "backward": "gradients of activations, "}
_BY_CAUSE = {
    "sums": "; an alarm by deviations that have added up",
    "later alarms": "; inside the fence, but alarms behind it are traced back to it",
}
_HEALED = {
    "healed": "and was given the majority's",
    "unhealed": "and could not be given the majority's",
    "reported": "which was reported alone",
    "stopped": "and training was stopped",
}


def number(value: Any) -> str:
    """Of four digits."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def many(count: int, what: str) -> str:
    """3, "step" -> "3 steps"."""
    return f"{count:,} {what}{'s'[: count != 1]}"


def spans(steps: list[int]) -> str:
    """[3, 4, 5, 9] -> "3-5, 9"."""
    found: list[list[int]] = []
    for step in steps:
        if found and step <= found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    shown = [f"{low}-{high}" if high > low else str(low) for low, high in found[:12]]
    return ", ".join(shown) + (f" and {len(found) - 12} more spans" if len(found) > 12 else "")


def in_steps(steps: list[int]) -> str:
    """[3, 4, 5, 9] -> "in steps 3-5, 9"."""
    return f"in step{'s'[: len(set(steps)) > 1]} {spans(steps)}"


def rest(steps: Sequence[int]) -> str:
    """What is said in place of what is not shown, of which there is one a step."""
    first, last = min(steps), max(steps)
    return f"and {len(steps):,} more in step{f's {first:,} to {last:,}' if last > first else f' {first:,}'}"


def several(told: list[tuple[str, int]], most: int = MOST) -> list[str]:
    """Texts and the steps that they were told in, as lines: what is the same is one, and what is cut is counted."""
    steps: dict[str, list[int]] = {}
    for text, step in told:
        steps.setdefault(text, []).append(step)
    lines = [f"{in_steps(of_text)}: {text}" for text, of_text in list(steps.items())[:most]]
    left = [step for of_text in list(steps.values())[most:] for step in of_text]
    if left:
        lines[-1] += f"; {rest(left)}"
    return lines


def found_of(one: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of each thing that speaks for or against a worker, but its alarms; see ``suspects.suspects``."""
    proved = [(proof_in_words(proof), proof["step"]) for proof in one["proofs"]]
    proved += [(other["text"], other["step"]) for other in one["other"] if other["proved"]]
    told = {
        "suspected": [(said["why"] or "why is not told", said["step"]) for said in one["suspected"]],
        "proved": proved,
        "cleared": [("given the same micro-batches, it did what its stage does", step) for step in one["cleared"]],
        "also": [(other["text"], other["step"]) for other in one["other"] if not other["proved"]],
    }
    return [(label, text) for label, of_label in told.items() for text in several(of_label)]


def proof_in_words(proof: dict[str, Any]) -> str:
    """What a twin step has proved."""
    batches = ", ".join(map(str, proof["micro_batches"][:24])) + (" ..." if proof["micro_batches"][24:] else "")
    which = f" ({_MADE_OF.get(proof['of'], '')}micro-batches {batches})" if batches else ""
    compared = f"{proof['agreeing']} of {proof['compared']} compared workers of its stage"
    return f"given the same micro-batches, it made other {WHAT.get(proof['of'], proof['of'])}{which} than {compared}"


def why_alarm(alarm: dict[str, Any]) -> str:
    """What has to be said beside an alarm's score, or nothing."""
    excuse = "; loss scaling may explain it" if alarm["overflow"] else ""
    return _BY_CAUSE.get(alarm["cause"], "") + excuse


def contradiction_in_words(worker: Worker, partners: Sequence[Worker]) -> str:
    """Whom a worker is at odds with, and what follows; ``partners`` are of one stage."""
    same_stage = [one for one in partners if one.stage == partners[0].stage]
    if not same_stage:
        return f"{plain(str(worker))} contradicts more workers of one stage than can be bad"
    return plain(Contradicted(worker, tuple(same_stage)).in_words())


def difference_in_words(who: str, event: dict[str, Any]) -> str:
    """What a twin step has shown without a majority."""
    what = WHAT.get(event["of"], event["of"])
    if event["as_received"]:
        return (
            f"given the same micro-batches, {who} and others of its stage say that they made the same {what}, those "
            "behind them that they received different ones, and no majority tells who is wrong"
        )
    return (
        f"given the same micro-batches, {who} made other {what} than others of its stage, and no majority tells who is "
        "wrong"
    )


def suspicion_in_words(event: dict[str, Any]) -> str:
    """Why somebody is a suspect, as its event has it; empty where it does not say."""
    return "" if event["why"] == NOT_TOLD else str(event["why"])


def weights_in_words(who: str, action: str) -> str:
    """Of a worker that held others than most of its stage."""
    return f"{who} held other weights than most of its stage, {_HEALED.get(action, action)}"


def conviction_in_words(one: dict[str, Any]) -> str:
    """Why a convicted worker is; empty where that stands among its proofs."""
    convicted = one["convicted"]
    proved = [proof["step"] for proof in one["proofs"]] + [other["step"] for other in one["other"] if other["proved"]]
    return "" if convicted["why"] == NOT_TOLD or convicted["step"] in proved else str(convicted["why"])


def plain(text: str) -> str:
    """Judgement's "worker (stage 1, replica 2)" as "stage 1, replica 2"."""
    return NAMED.sub(r"stage \1, replica \2", text)
