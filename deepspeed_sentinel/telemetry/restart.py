"""How a run starts again without some of its slots: how many processes, on which slots, and lines for launchers.

A mesh has as many workers in each stage, so what is left after the bad ones is cut to whole replicas, and the rest
stays idle: 3 x 3 workers without one are 8, and 6 of them are started. Lines name the slots to start on, and not those
to leave out, since a hostfile may have more slots than the run has used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed_sentinel.telemetry.devices import Device

Slot = tuple[str, int]  # a host, and a place there


@dataclass(frozen=True)
class Restart:
    """What is started again, and what is not.

    Attributes:
        stages, replicas: of the mesh that can be started; no replica is one where too few slots are left.
        kept: the slots of each host that get a process.
        idle: slots that nothing is known against, and that make no whole replica.
        gpus: whether all that is kept are GPUs. On one host without any, slots are numbers of processes alone.
    """

    stages: int
    replicas: int
    kept: Mapping[str, Sequence[int]]
    idle: tuple[Slot, ...]
    gpus: bool

    @property
    def processes(self) -> int:
        return self.stages * self.replicas

    def lines(self) -> dict[str, Any]:
        """``deepspeed``, options of its launcher; ``torchrun``, by host; both empty where nothing can be started.

        Without a hostfile DeepSpeed knows the host that it is called on alone, as localhost, and without GPUs it finds
        as many slots there as the host has memory nodes, fewer than processes: there it is told their number.
        """
        torchrun = {}
        for host, slots in self.kept.items():
            seen = f"CUDA_VISIBLE_DEVICES={listed(slots)} " if self.gpus else ""
            nodes = f"--nnodes={len(self.kept)} " if len(self.kept) > 1 else ""
            torchrun[host] = f"{seen}torchrun {nodes}--nproc_per_node={len(slots)}"
        if not self.kept:
            deepspeed = ""
        elif len(self.kept) == 1 and not self.gpus:
            deepspeed = f"--num_gpus={self.processes}"
        else:
            hosts = "@".join(f"{host}:{listed(slots)}" for host, slots in self._called().items())
            deepspeed = f"--include={hosts}"
        return {"deepspeed": deepspeed, "torchrun": torchrun}

    def hostfile(self) -> list[str]:
        """Lines of one that has all slots that ``deepspeed`` names, and beside them no more than it must."""
        return [f"{host} slots={max(slots) + 1}" for host, slots in self._called().items()]

    def in_words(self) -> str:
        """What to start, and what stays idle."""
        if not self.replicas:
            return "What is left makes no whole replica: add machines"
        replicas = f"{self.replicas} replica{'s'[: self.replicas != 1]}"
        told = [f"Start {self.processes} processes ({self.stages} stages x {replicas})"]
        (host, *more) = self.kept
        if not more:
            told[0] += f" on {host}, which DeepSpeed calls localhost where it is given no hostfile"
        if self.idle:
            verb = "stays" if len(self.idle) == 1 else "stay"
            told.append(
                f"{_slots_in_words(self.idle)} {verb} idle, as left over from whole replicas: nothing is known against "
                f"{'it' if len(self.idle) == 1 else 'them'}"
            )
        if not more and not self.gpus:
            told.append("Without GPUs a slot is no part of it: these run on the same processor and memory as before")
        return ". ".join(told)

    def _called(self) -> dict[str, Sequence[int]]:
        """``kept``, by what DeepSpeed calls the hosts."""
        alone = len(self.kept) == 1
        return {"localhost" if alone else host: slots for host, slots in self.kept.items()}


def restart(devices: Sequence[Sequence[Device]], bad: Collection[Slot], most: int) -> Restart:
    """What can be started without the bad slots.

    Idle are first those that share a host with a bad slot, of hosts where fewest are left, so that such a host is free
    as a whole to be tested; then the last by name.

    Args:
        devices: [S][R], of all workers.
        bad: slots that are to be left out, of this run or not.
        most: replicas, where it is known of fewer slots that they are bad than there are bad workers.
    """
    stages = len(devices)
    on = {(one.host, one.slot): one for of_stage in devices for one in of_stage if one.host}
    hosts: dict[str, list[int]] = defaultdict(list)
    for host, slot in sorted(set(on) - set(bad)):
        hosts[host].append(slot)
    left = sum(map(len, hosts.values()))
    replicas = min(left // stages, most)
    shared = {host for host, _ in bad}
    first = sorted((host for host in hosts if host in shared), key=lambda host: len(hosts[host]))
    order = [*first, *(host for host in reversed(hosts) if host not in shared)]
    candidates = [(host, slot) for host in order for slot in reversed(hosts[host])]
    idle = tuple(candidates[: left - stages * replicas]) if replicas else ()
    kept = {host: [slot for slot in slots if (host, slot) not in idle] for host, slots in hosts.items()}
    kept = {host: slots for host, slots in kept.items() if slots and replicas}
    gpus = all(one.on_gpu for (host, _), one in on.items() if host in kept)
    if len(kept) == 1 and not gpus:
        kept, idle = {host: list(range(stages * replicas)) for host in kept}, ()
    return Restart(stages, replicas, kept, tuple(sorted(idle)), gpus)


def _slots_in_words(slots: Sequence[Slot]) -> str:
    """[("a", 1), ("a", 2), ("b", 0)] -> "a slots 1,2; b slot 0"."""
    hosts: dict[str, list[int]] = defaultdict(list)
    for host, slot in slots:
        hosts[host].append(slot)
    return "; ".join(f"{host} slot{'s'[: len(of_host) > 1]} {listed(of_host)}" for host, of_host in hosts.items())


def listed(parts: Collection[Any]) -> str:
    """[1, 2] -> "1,2"."""
    return ",".join(map(str, parts))
