"""Which machines to leave out when a run is started again: ``exclude.json``, and lines for launchers.

Nothing here starts anything. The file says of each convicted worker its rank, host and device and why it was convicted;
beside that, what is given to

    deepspeed     ``--exclude=node-3:1,4``  these slots of these hosts
    a hostfile    the hosts without any of them, whole
    SLURM         ``--exclude=node-3``      of sbatch and srun, which leave out whole hosts

A slot is a worker's place among the processes of its host, as DeepSpeed's launcher counts where all slots of a host are
in use.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed_sentinel.judgement.proof import Proof
from deepspeed_sentinel.judgement.unsettled import Contradicted
from deepspeed_sentinel.judgement.verdict import Finding, Verdict
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.devices import Device

FILE = "exclude.json"


@dataclass(frozen=True)
class Convict:
    """A convicted worker and where it runs.

    Attributes:
        worker: who.
        rank: its global rank.
        device: where it ran when it was convicted, in its own words: a run that goes on from a checkpoint may have
            another machine in its place.
        step: at which it was convicted; None where that is not known.
        why: in words.
    """

    worker: Worker
    rank: int
    device: Device
    step: int | None
    why: str

    def __str__(self) -> str:
        return f"rank {self.rank} = {self.worker} on {self.device}"


def saved(convicts: Sequence[Convict]) -> list[dict[str, Any]]:
    """For a checkpoint: plain values alone."""
    return [{**vars(one), "worker": list(one.worker), "device": vars(one.device).copy()} for one in convicts]


def read_saved(said: Any) -> dict[Worker, Convict]:
    """The inverse of ``saved``, of whatever a checkpoint holds: what is none of its entries is left out."""
    found = {}
    for one in said if isinstance(said, list) else ():
        try:
            worker, step = Worker(*map(int, one["worker"])), one["step"]
            step = None if step is None else int(step)
            found[worker] = Convict(worker, int(one["rank"]), Device(**one["device"]), step, str(one["why"]))
        except (TypeError, ValueError, KeyError):
            continue
    return found


def reason(verdict: Verdict, worker: Worker) -> str:
    """Why a worker is convicted in the step of a verdict, in words: the first that was told against it."""
    told: tuple[Proof | Contradicted | Finding, ...] = (*verdict.proofs, *verdict.contradicted, *verdict.findings)
    against = [str(one) for one in told if one.worker == worker]
    return against[0] if against else "its weights, a reduction or a step computed twice were others than they must be"


def exclusions(convicts: Sequence[Convict], devices: Sequence[Sequence[Device]], step: int) -> dict[str, Any]:
    """What ``exclude.json`` holds.

    Args:
        convicts: who.
        devices: [S][R], of all workers.
        step: the global step at which this is said.
    """
    everywhere = Counter(device.host for of_stage in devices for device in of_stage if device.host)
    bad: dict[str, list[int]] = {}
    for host, slot in sorted({(one.device.host, one.device.slot) for one in convicts if one.device.host}):
        bad.setdefault(host, []).append(slot)
    stages, replicas = len(devices), len(devices[0])
    return {
        "step": step,
        "workers": [
            {
                "stage": one.worker.stage,
                "replica": one.worker.replica,
                "rank": one.rank,
                "host": one.device.host,
                "slot": one.device.slot,
                "device": one.device.key,
                "step": one.step,
                "why": one.why,
            }
            for one in convicts
        ],
        "hosts": list(bad),
        "deepspeed": f"--exclude={'@'.join(f'{host}:{_list(slots)}' for host, slots in bad.items())}" if bad else "",
        "hostfile": [f"{host} slots={slots}" for host, slots in everywhere.items() if host not in bad],
        "slurm": f"--exclude={_list(bad)}" if bad else "",
        "replicas_left": (stages * replicas - len(convicts)) // stages,
    }


def write_exclusions(path: Path, what: dict[str, Any]) -> None:
    """Write it whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _list(parts: Any) -> str:
    return ",".join(map(str, parts))
