"""Which machines to leave out when a run is started again: ``exclude.json``, and lines for launchers.

Nothing here starts anything. The file says of each convicted worker its rank, host and device and why it was convicted;
beside that, what is given to

    deepspeed     ``--include=node-0:0,1@node-3:0,2``  the slots to start on, see ``restart.py``
    torchrun      a line for each host
    a hostfile    the hosts that are left; for use with what ``deepspeed`` is given, since it counts slots from 0
    SLURM         ``--exclude=node-3``                 of sbatch and srun, which leave out whole hosts: ``slurm_note``
                                                       says what goes with the bad

A slot is a worker's place among the processes of its host, as DeepSpeed's launcher counts where all slots of a host are
in use.

Not every entry is a reason to take a machine away: ``in_lines`` says which the lines do without. Where nothing is kept
out of the weights, they bring honest workers outside of the fences too, so whom statistics alone convict then is for
people to look at.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed_sentinel.judgement.trial import Proof
from deepspeed_sentinel.judgement.unsettled import Contradicted
from deepspeed_sentinel.judgement.verdict import Finding, Verdict
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.book import MOST
from deepspeed_sentinel.telemetry.devices import Device, claimed_by
from deepspeed_sentinel.telemetry.restart import listed, restart
from deepspeed_sentinel.telemetry.who import Place, place_of

FILE = "exclude.json"


@dataclass(frozen=True)
class Convict:
    """A convicted worker and where it runs.

    Attributes:
        place: who, and where it ran when it was convicted, in its own words: a run that goes on from a checkpoint may
            have another machine in its place.
        device: on which.
        step: at which it was convicted; None where that is not known.
        why: in words.
        proved: by exact comparison or contradiction, or by statistics alone; None where that is not known.
        observed: it was convicted while nothing was kept out of the weights.
        injected: while faults were injected on purpose, in this run or in the one that it goes on from.
    """

    place: Place
    device: Device
    step: int | None
    why: str
    proved: bool | None = None
    observed: bool = False
    injected: bool = False

    @property
    def worker(self) -> Worker:
        return Worker(self.place.stage, self.place.replica)

    @property
    def in_lines(self) -> bool:
        """Whether a run is to start without its machine, see the module's docstring; of one that is not known none."""
        return bool(self.device.host and (self.proved or not self.observed))

    def __str__(self) -> str:
        return str(self.place)


def saved(convicts: Sequence[Convict]) -> list[dict[str, Any]]:
    """For a checkpoint: plain values alone."""
    return [
        {
            "worker": [one.place.stage, one.place.replica],
            "rank": one.place.rank,
            "device": vars(one.device).copy(),
            "step": one.step,
            "why": one.why,
            "proved": one.proved,
            "observed": one.observed,
            "injected": one.injected,
        }
        for one in convicts
    ]


def read_saved(said: Any) -> dict[Worker, Convict]:
    """The inverse of ``saved``, of whatever a checkpoint holds: what is none of its entries is left out."""
    found = {}
    for one in said if isinstance(said, list) else ():
        try:
            worker, step = Worker(*map(_whole, one["worker"])), one["step"]
            step = None if step is None else _whole(step)
            device, why = Device(**one["device"]), one["why"]
            # States of before these were told have none of them.
            proved, observed, injected = one.get("proved"), one.get("observed", False), one.get("injected", False)
            if not isinstance(why, str) or {type(proved), type(observed), type(injected)} - {bool, type(None)}:
                raise TypeError(one)
            place = place_of(worker, _whole(one["rank"]), device)
            found[worker] = Convict(place, device, step, why, proved, bool(observed), bool(injected))
        except (TypeError, ValueError, LookupError):
            continue
    return found


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST:
        raise ValueError(f"{value!r:.100} is none of 0 to {MOST}")
    return value


def read_earlier(path: Path) -> list[dict[str, Any]]:
    """The entries of ``workers`` in a file that an earlier run left, but those of a drill, which speak against nobody.

    Raises:
        OSError: the file is there and cannot be read.
        ValueError: it is not what ``write_exclusions`` writes.
    """
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["workers"]
        known = [{**one, "device": str(one["device"]), **_checked(one)} for one in entries if not one.get("injected")]
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is none of ours ({error!r}): move it away") from error
    return known


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    where = Device(str(entry["host"]), int(entry["slot"]))
    return {"host": where.host, "slot": where.slot, "in_lines": bool(entry.get("in_lines", True) and where.host)}


def reason(verdict: Verdict, worker: Worker) -> str:
    """Why a worker is convicted in the step of a verdict, in words: the first that was told against it."""
    first = _against(verdict, worker)
    return str(first) if first else "its weights, a reduction or a step computed twice were others than they must be"


def proved(verdict: Verdict, worker: Worker) -> bool:
    """Whether a worker that is convicted in the step of a verdict is so by more than statistics."""
    return not isinstance(_against(verdict, worker), Finding)


def _against(verdict: Verdict, worker: Worker) -> Proof | Contradicted | Finding | None:
    told: tuple[Proof | Contradicted | Finding, ...] = (*verdict.proofs, *verdict.contradicted, *verdict.findings)
    return next((one for one in told if one.worker == worker), None)


def exclusions(
    convicts: Sequence[Convict],
    devices: Sequence[Sequence[Device]],
    step: int,
    earlier: Sequence[dict[str, Any]] = (),
    injected: bool = False,
) -> dict[str, Any]:
    """What ``exclude.json`` holds.

    Args:
        convicts: who.
        devices: [S][R], of all workers.
        step: the global step at which this is said.
        earlier: entries of runs before, see ``read_earlier``. They are kept, or the start after next would take back
            the machines that this one does without; but for those that this run says as much against.
        injected: faults are injected on purpose. Lines are then there to be tried.
    """
    again = {one.device.key for one in convicts if not injected}
    # Whom a drill convicted stays so where a run goes on from its checkpoint, and is no reason to do without a machine.
    out = [one for one in convicts if one.in_lines and (injected or not one.injected)]
    surely = {one.device.key for one in out if not injected}
    kept = [
        {**one, "earlier": True}
        for one in earlier
        if one["device"] not in (surely if one.get("in_lines", True) else again)
    ]
    everywhere = Counter(device.host for of_stage in devices for device in of_stage if device.host)
    bad: dict[str, list[int]] = {}
    for host, slot in sorted(
        {
            *((one.device.host, one.device.slot) for one in out),
            *((one["host"], one["slot"]) for one in kept if one["host"] and one.get("in_lines", True)),
        }
    ):
        bad.setdefault(host, []).append(slot)
    workers = [
        {
            "stage": one.place.stage,
            "replica": one.place.replica,
            "rank": one.place.rank,
            "host": one.device.host,
            "slot": one.device.slot,
            "device": one.device.key,
            "step": one.step,
            "why": one.why,
            "proved": one.proved,
            "injected": injected or one.injected,
            "in_lines": one in out,
            **_doubted(one.device, devices),
        }
        for one in convicts
    ] + kept
    unknown = [one for one in convicts if not one.device.host]
    most = (len(devices) * len(devices[0]) - len(out) - len(unknown)) // len(devices)
    anew = restart(devices, {(host, slot) for host, slots in bad.items() for slot in slots}, most)
    key_of = {(device.host, device.slot): device.key for of_stage in devices for device in of_stage}
    lines = anew.lines() if bad else {"deepspeed": "", "torchrun": {}}
    note = [anew.in_words()] if bad else []
    return {
        "step": step,
        "injected": injected,
        "workers": workers,
        "hosts": list(bad),
        "replicas_left": anew.replicas,
        "processes": anew.processes,
        "idle": [{"host": host, "slot": slot, "device": key_of[host, slot]} for host, slot in anew.idle],
        "note": ". ".join([*note, *_about(workers, injected)]),
        **lines,
        "hostfile": anew.hostfile(),
        "slurm": f"--exclude={listed(bad)}" if bad else "",
        "slurm_note": _beside_the_bad(bad, everywhere),
    }


def _about(workers: Sequence[Mapping[str, Any]], injected: bool) -> list[str]:
    """What is to be known of entries before anything is done about them."""
    told = []
    if unknown := sum(not one["host"] for one in workers):
        told.append(f"Which machine {unknown} of the convicted runs on is not known")
    left = [one for one in workers if one["host"] and not one.get("in_lines", True)]
    if not injected and any(one.get("injected") for one in left):
        told.append("Whom a drill convicted, from whose checkpoint this run goes on, the lines do not leave out")
    if any(injected or not one.get("injected") for one in left):
        told.append(
            "Who has in_lines false was convicted by statistics alone while nothing was kept out of the weights: an "
            "honest worker beside a fault looks the same, so look into it, and the lines do not leave it out"
        )
    if injected:
        told.append("Faults were injected on purpose: nothing here speaks against a machine, the lines are to be tried")
    return told


def _beside_the_bad(bad: dict[str, list[int]], everywhere: Counter[str]) -> str:
    """What SLURM's line takes out although nothing is known against it: it has no word for a slot of a host."""
    told = []
    for host, slots in bad.items():
        sound = everywhere[host] - len(slots)
        if host not in everywhere:
            told.append(f"with {host} all it has")
        elif sound:
            told.append(f"with {host} also {sound} slot{'s'[: sound != 1]} that nothing is known against")
    return f"SLURM leaves out whole hosts, not single GPUs: {'; '.join(told)}" if told else ""


def _doubted(device: Device, devices: Sequence[Sequence[Device]]) -> dict[str, Any]:
    """Where several workers name a machine as theirs, all of them."""
    claimants = claimed_by(device, devices)
    return {"claimed_by_several": [list(worker) for worker in claimants]} if claimants[1:] else {}


def write_exclusions(path: Path, what: dict[str, Any]) -> None:
    """Write it whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
