"""Which piece of hardware a worker runs on: what it says of itself, how that travels, and by which name it is kept.

A rank is a number of one launch; what fails is a device. Of each worker its host, its slot (the local rank, or the
number that its launcher chose), its GPU's uuid and PCI address, and what torch calls it there, are gathered when a run
starts, as ``BYTES`` bytes of a fixed layout. A device is kept by the most lasting name that it has:

    gpu:<uuid>            a GPU, in whichever host and under whichever rank
    pci:<host>/<address>  a GPU of which torch tells no uuid
    cpu:<host>/<slot>     no GPU: a process of a host

All of it is a worker's own word. Nothing here proves it, so what is kept by it is for people to look into.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepspeed_sentinel.mesh import Worker

UNNAMED = "unnamed"
_LAYOUT = struct.Struct("<4sI128s64s32s32s")
_MAGIC = b"dev2"
BYTES = _LAYOUT.size
_HOST, _UUID, _ADDRESS, _NAME = 128, 64, 32, 32
_MOST_SLOTS = 65536
_SHOWN = 3  # shared places that are told one by one
_TEXT = re.compile(r"[A-Za-z0-9._:-]*")
_NO_UUID = re.compile(r"[0-]*")  # what some drivers tell in place of one


@dataclass(frozen=True)
class Device:
    """Where a worker runs, in its own words: letters, digits and ``._:-`` alone.

    Attributes:
        host: its host's name, of at most 128 characters; empty only where the worker gave no name that can be.
        slot: its place among the processes of that host, from 0; where its launcher has chosen some of the host's
            places, the number that it chose.
        uuid: of its GPU, as nvidia-smi has it without "GPU-"; at most 64 characters, empty without one.
        pci: address of its GPU, "domain:bus:device" in hexadecimal digits; at most 32 characters, empty without one.
        name: what torch calls the device there, such as "cuda:3" or "cpu"; at most 32 characters.

    Raises:
        ValueError: a text is too long or has other characters, or the slot is none.
    """

    host: str
    slot: int
    uuid: str = ""
    pci: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        texts = (self.host, self.uuid, self.pci, self.name)
        limits = (_HOST, _UUID, _ADDRESS, _NAME)
        for name, text, most in zip(("host", "uuid", "pci", "name"), texts, limits, strict=True):
            if len(text) > most or not _TEXT.fullmatch(text):
                raise ValueError(
                    f"{name} of a device is {text!r:.160}; allowed are at most {most} of the characters A-Z, a-z, "
                    "0-9 and ._:-; look at what that worker's host calls itself"
                )
        if type(self.slot) is not int or not 0 <= self.slot < _MOST_SLOTS:
            raise ValueError(
                f"slot of a device is {self.slot!r:.160}; allowed are 0 to {_MOST_SLOTS - 1}: its local rank"
            )

    @property
    def key(self) -> str:
        """The name by which it is kept; see the module's docstring."""
        if not self.host:
            return UNNAMED
        if self.uuid:
            return f"gpu:{self.uuid}"
        return f"pci:{self.host}/{self.pci}" if self.pci else f"cpu:{self.host}/{self.slot}"

    @property
    def on_gpu(self) -> bool:
        return bool(self.uuid or self.pci or self.name.startswith("cuda"))

    def is_another(self, other: Device) -> bool:
        """Whether the two are known to be different devices, by the most lasting name that both have."""
        if not (self.host and other.host):
            return False
        if self.uuid and other.uuid:
            return self.uuid != other.uuid
        by_address = self.pci and other.pci
        return self.host != other.host or (self.pci != other.pci if by_address else self.slot != other.slot)

    def __str__(self) -> str:
        if not self.host:
            return "a device that gave no name"
        return f"{self.host} slot {self.slot}{f', PCI {self.pci}' if self.pci else ''}"


NOBODY = Device(host="", slot=0)


def own_device(device: torch.device, slot: int | None = None) -> Device:
    """What this process says of itself.

    Args:
        device: that it computes on.
        slot: its place on its host; None takes what the environment says, or 0.
    """
    slot = _slot(os.environ) if slot is None else slot
    uuid, pci = _gpu(device) if device.type == "cuda" else ("", "")
    host, name = _fit(socket.gethostname(), _HOST) or "host", _fit(str(device), _NAME)
    return Device(host, min(slot, _MOST_SLOTS - 1), uuid, pci, name)


def _slot(environment: Mapping[str, str]) -> int:
    """The local rank; or, where a launcher has given one device to each process of the host, the number of ours.

    DeepSpeed started with ``--include=node-1:0,2`` numbers two processes 0 and 1, and the second one is on slot 2:
    under its local rank a later run would leave out another.
    """
    said = environment.get("LOCAL_RANK", "0")
    rank = int(said) if said.isdecimal() else 0
    here = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE", "")  # torchrun's, DeepSpeed's
    chosen = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if here != str(len(chosen)) or rank >= len(chosen) or not all(map(str.isdecimal, chosen)):
        return rank
    return int(chosen[rank])


def to_bytes(device: Device) -> np.ndarray:
    """uint8 [BYTES]: a device as it is sent to all ranks."""
    texts = (device.host, device.uuid, device.pci, device.name)
    packed = _LAYOUT.pack(_MAGIC, device.slot, *(text.encode("ascii") for text in texts))
    return np.frombuffer(packed, np.uint8).copy()


def from_bytes(said: np.ndarray) -> Device:
    """The inverse of ``to_bytes``, of a stranger's bytes.

    Args:
        said: uint8 [BYTES].

    Raises:
        ValueError: they are not of that form.
    """
    if said.dtype != np.uint8 or said.shape != (BYTES,):
        raise ValueError(f"a device is {said.dtype} {list(said.shape)}; allowed is uint8 [{BYTES}]: see to_bytes")
    magic, slot, *fields = _LAYOUT.unpack(said.tobytes())
    if magic != _MAGIC:
        raise ValueError(f"a device begins with {magic!r}; allowed is {_MAGIC!r}: run the same version on all ranks")
    texts = [field.rstrip(b"\0").decode("latin-1") for field in fields]
    if not texts[0]:
        raise ValueError("host of a device is empty; name one")
    return Device(texts[0], slot, *texts[1:])


def read_gathered(said: np.ndarray, ranks: np.ndarray) -> tuple[tuple[tuple[Device, ...], ...], tuple[str, ...]]:
    """Every worker's device [S][R], and what to tell about them. What is malformed is nobody's but its sender's.

    Args:
        said: uint8 [ranks, BYTES], what every rank said.
        ranks: int [S, R], the rank of each worker.
    """
    told: list[str] = []

    def read(stage: int, replica: int, rank: int) -> Device:
        try:
            return from_bytes(said[rank])
        except ValueError as error:
            told.append(
                f"{Worker(stage, replica)} does not say which device it runs on, so nothing is kept of it: {error}"
            )
            return NOBODY

    devices = tuple(
        tuple(read(stage, replica, rank) for replica, rank in enumerate(of_stage))
        for stage, of_stage in enumerate(ranks.tolist())
    )
    return devices, (*told, *shared_places(devices))


def claimed_by(device: Device, devices: Sequence[Sequence[Device]]) -> tuple[Worker, ...]:
    """Who of a run [S][R] names this device, or its slot of its host, as its own. Nobody, where it has no name."""
    place = (device.host, device.slot)
    return tuple(
        Worker(stage, replica)
        for stage, of_stage in enumerate(devices)
        for replica, one in enumerate(of_stage)
        if device.host and one.host and (one.key == device.key or (one.host, one.slot) == place)
    )


def shared_places(devices: Sequence[Sequence[Device]]) -> tuple[str, ...]:
    """What to tell about slots of a host that several workers [S][R] name as theirs; of one device see ``keys_of``."""
    claims: dict[tuple[str, int], dict[Worker, str]] = defaultdict(dict)
    for stage, of_stage in enumerate(devices):
        for replica, device in enumerate(of_stage):
            if device.host:
                claims[device.host, device.slot][Worker(stage, replica)] = device.key
    shared = [
        f"{host} slot {slot} is named as its place by {' and '.join(map(str, keys))}"
        for (host, slot), keys in claims.items()
        if len(set(keys.values())) > 1
    ]
    if not shared:
        return ()
    more = f"; and {len(shared) - _SHOWN} more such places" if shared[_SHOWN:] else ""
    return (
        f"{'; '.join(shared[:_SHOWN])}{more}: unless several launchers share a host, or none sets LOCAL_RANK, not all "
        "can be right, and a machine that is named later may be another's",
    )


def keys_of(devices: Sequence[Sequence[Device]]) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The names [S][R] by which the devices of a run are kept, and what to tell about names that two workers give.

    A GPU cannot be in two hosts at once: where two claim so one of them lies, and each is kept by its host as well, so
    that nothing comes upon the true one. On one host two processes may share a device: it is kept as one.
    """
    workers = defaultdict(list)
    for stage, of_stage in enumerate(devices):
        for replica, device in enumerate(of_stage):
            workers[device.key].append((Worker(stage, replica), device.host))
    told, contested = [], set()
    for key, claims in workers.items():
        if key == UNNAMED or len(claims) < 2:
            continue
        names = ", ".join(f"{worker} on {host}" for worker, host in claims)
        if len({host for _, host in claims}) > 1:
            contested.add(key)
            told.append(f"{key} is named as its device by {names}: not all can be right. Each is kept by its host too")
        else:
            told.append(f"{key} is named as their device by {names}: what is counted for it is of all of them")
    return (
        tuple(
            tuple(f"{one.key}@{one.host}" if one.key in contested else one.key for one in of_stage)
            for of_stage in devices
        ),
        tuple(told),
    )


def _gpu(device: torch.device) -> tuple[str, str]:
    """uuid and PCI address as far as torch tells them; it tells neither in every version and on every platform."""
    properties = torch.cuda.get_device_properties(device)
    uuid = _fit(str(getattr(properties, "uuid", "")), _UUID)
    domain, bus, slot = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    pci = "" if domain is None or bus is None or slot is None else f"{domain:08x}:{bus:02x}:{slot:02x}"
    return "" if _NO_UUID.fullmatch(uuid) else uuid, pci


def _fit(text: str, most: int) -> str:
    return re.sub(r"[^A-Za-z0-9._:-]", "_", text)[:most]
