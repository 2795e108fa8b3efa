"""Each worker that something was told against, with its evidence: from the events of a run."""

from __future__ import annotations

from typing import Any

from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.report.reading import RunFiles
from deepspeed_sentinel.telemetry.report.words import (
    contradiction_in_words,
    difference_in_words,
    suspicion_in_words,
    weights_in_words,
)

_SHOWN = 8  # characters of a GPU's uuid, as in the log
STATES = ("convicted", "proved", "suspect", "released", "alarmed", "disputed", "cleared", "noted")  # the gravest first


def name_of(run: RunFiles, worker: Worker) -> str:
    """As the log names it: ``stage 1, replica 2 (rank 7, node-03, cuda:3, GPU-1a2b3c4d)``."""
    place = run.places.get(worker, {})
    rank = None if place.get("rank") is None else f"rank {place['rank']}"
    gpu = (place.get("gpu") or "")[: len("GPU-") + _SHOWN]
    where = ", ".join(filter(None, (rank, place.get("host"), place.get("device"), gpu)))
    return f"stage {worker.stage}, replica {worker.replica}" + (f" ({where})" if where else "")


def suspects(run: RunFiles) -> list[dict[str, Any]]:
    """Workers that an event is told of, the gravest first. Steps and counts are of this run alone.

    "state": see ``STATES``; proved is who was not convicted all the same, such as a worker of the first stage.
    "shown": whether anything was proved. "worst": the alarm with the largest score, as its event has it. "proofs": what
    differed, in which step, and of how many workers most agreed. "audits": what audits of its alarms said, with counts.
    "suspected": steps, and why. "other": what else was told, in which step, and whether it is a proof.
    """
    found: dict[Worker, dict[str, Any]] = {}

    def of(worker: Any) -> dict[str, Any]:
        worker = Worker(*worker)
        place = run.places.get(worker, {})
        return found.setdefault(
            worker,
            {
                "stage": worker.stage,
                "replica": worker.replica,
                "name": name_of(run, worker),
                **{name: place.get(name) for name in ("rank", "local_rank", "host", "device", "gpu")},
                "trusted": run.mesh.is_trusted(worker.stage),
                "alarm_steps": [],
                "alarms": 0,
                "statistics": {},
                "audits": {},
                "worst": None,
                "disputes": 0,
                "proofs": [],
                "suspected": [],
                "cleared": [],
                "convicted": None,
                "released": None,
                "shown": False,
                "other": [],
            },
        )

    for event in run.events:
        kind, step = event["kind"], event["step"]
        if kind in _OF_ONE:
            _told(of((event["stage"], event["replica"])), event)
        elif kind == "dispute":
            for side in (event["at_fault"],) if event["at_fault"] else (event["sender"], event["receiver"]):
                of(side)["disputes"] += len(event["micro_batches"])
        elif kind == "weights" and event["replica"] is not None and event["replica"] < run.mesh.replicas:
            _also(of((event["stage"], event["replica"])), step, weights_in_words("it", event["action"]))
        elif kind in ("poisoned", "difference"):
            what = _POISONED if kind == "poisoned" else difference_in_words("it", event)
            for worker in event["workers"]:
                _also(of(worker), step, what)
        elif kind == "end":
            for worker in event["convicted"]:
                one = of(worker)
                one["convicted"] = one["convicted"] or dict(_BEFORE)
    for said in excluded_now(run):
        one = of((said["stage"], said["replica"]))
        if one["host"] is None:
            one["host"], one["local_rank"] = str(said.get("host") or "") or None, said.get("slot")
        if one["released"] is None and one["convicted"] in (None, _BEFORE):
            proved = said.get("proved")
            proved = proved if isinstance(proved, bool) else None
            one["convicted"] = {"step": said.get("step"), "proved": proved, "why": str(said.get("why"))}
    for one in found.values():
        one["state"] = _state(one)
    return sorted(found.values(), key=lambda one: (STATES.index(one["state"]), -one["alarms"], one["stage"]))


_BEFORE = {"step": None, "proved": None, "why": "before this run, as the checkpoint that it went on from says"}


def excluded_now(run: RunFiles) -> list[dict[str, Any]]:
    """Entries of ``exclude.json`` that are of workers of this run; those of machines left out before are not."""
    workers = run.exclude.get("workers")
    gone = [(event["stage"], event["replica"]) for event in run.events if event["kind"] == "replaced"]
    return [
        one
        for one in (workers if isinstance(workers, list) else ())
        if isinstance(one, dict) and not one.get("earlier") and run.has((one.get("stage"), one.get("replica")))
        if (one["stage"], one["replica"]) not in gone
    ]


_OF_ONE = {"alarm", "proof", "contradicted", "suspicion", "cleared", "conviction", "release", "replay", "misfit"}
_POISONED = "it handed over other sums than most when gradients were reduced, and the step was not applied"
_OTHER = {
    "replay": "it computed the step twice and made different things of the same",
    "misfit": "it told its stage a mean that its messages cannot have, which counted for nothing",
}


def _also(one: dict[str, Any], step: int, text: str, proved: bool = False) -> None:
    one["shown"] |= proved
    one["other"].append({"step": step, "text": text, "proved": proved})


def _told(one: dict[str, Any], event: dict[str, Any]) -> None:
    kind, step = event["kind"], event["step"]
    if kind == "alarm":
        _alarm(one, event)
    elif kind == "proof":
        one["shown"] = True
        one["proofs"].append({name: event[name] for name in ("step", "of", "micro_batches", "agreeing", "compared")})
    elif kind == "contradicted":
        worker = Worker(event["stage"], event["replica"])
        _also(one, step, contradiction_in_words(worker, event["partners"]), proved=True)
    elif kind == "suspicion":
        one["suspected"].append({"step": step, "why": suspicion_in_words(event)})
    elif kind == "cleared":
        one["cleared"].append(step)
    elif kind == "conviction":
        by_proof = one["shown"] if event["proved"] is None else event["proved"]
        one["convicted"], one["released"] = {"step": step, "proved": by_proof, "why": event["why"]}, None
    elif kind == "release":
        one["released"] = step
    else:
        _also(one, step, _OTHER[kind], proved=kind == "replay")


def _alarm(one: dict[str, Any], event: dict[str, Any]) -> None:
    if one["alarm_steps"][-1:] != [event["step"]]:
        one["alarm_steps"].append(event["step"])
    one["alarms"] += max(1, len(event["micro_batches"]))
    for name, value in (("statistics", event["statistic"]), ("audits", event["audit"])):
        if value is not None:
            one[name][value] = one[name].get(value, 0) + 1
    if one["worst"] is None or _score(event) > _score(one["worst"]):
        one["worst"] = {name: event[name] for name in _EVIDENCE}


_EVIDENCE = (
    "step", "direction", "link", "micro_batches", "statistic", "value", "residual", "low", "high", "score", "cause",
    "overflow", "audit",
)  # fmt: skip


def _score(event: dict[str, Any]) -> float:
    return -1.0 if event["score"] is None else float(event["score"])


def _state(one: dict[str, Any]) -> str:
    if one["convicted"]:
        return "convicted" if one["released"] is None else "released"
    if one["shown"]:
        return "proved"
    if max((said["step"] for said in one["suspected"]), default=-1) > max(one["cleared"], default=-1):
        return "suspect"
    if one["cleared"]:
        return "cleared"
    return "alarmed" if one["alarms"] else "disputed" if one["disputes"] else "noted"
