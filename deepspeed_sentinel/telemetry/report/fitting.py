"""Whether a value of JSON is what a field of an event has: of its type, and inside the mesh."""

from __future__ import annotations

import types
import typing
from typing import Any, TypeGuard

from deepspeed_sentinel.mesh import Mesh, Worker

MOST = 1 << 53  # what every reader of JSON takes for a whole number
_LARGE = 1e300
UNREADABLE = object()


def fit(value: Any, hint: Any, name: str, mesh: Mesh) -> Any:
    """A value of JSON as a field's type has it, or ``UNREADABLE``."""
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else fit(value, of[0], name, mesh)
    if origin is typing.Literal:
        return value if isinstance(value, str) and value in of else UNREADABLE
    if hint is Worker:
        inside = _whole_list(value, 2) and value[0] < mesh.stages and value[1] < mesh.replicas
        return Worker(*value) if inside else UNREADABLE
    if origin in (list, tuple):
        read = [fit(part, of[0], name, mesh) for part in value] if isinstance(value, list) else [UNREADABLE]
        return UNREADABLE if UNREADABLE in read or not _right_size(name, read, mesh) else read
    if origin is dict:
        fits = isinstance(value, dict) and (of[1] is not int or all(map(whole, value.values())))
        return value if fits else UNREADABLE
    if hint is float:
        # Null stands for what is not finite.
        return value if value is None else float(value) if _number(value) else UNREADABLE
    if hint is int:
        most = {"stage": mesh.stages, "replica": mesh.replicas, "column": mesh.replicas, "columns": mesh.replicas}
        return value if whole(value) and value < most.get(name, MOST) else UNREADABLE
    return value if isinstance(value, hint) else UNREADABLE


def _right_size(name: str, read: list[Any], mesh: Mesh) -> bool:
    if name == "scores" and read and isinstance(read[0], list):
        return len(read) == mesh.stages and all(len(row) == mesh.replicas for row in read)
    if name == "moved" and read and isinstance(read[0], list):
        most = (mesh.stages, mesh.replicas, mesh.replicas, mesh.replicas)
        return all(len(one) == 4 and all(at < end for at, end in zip(one, most, strict=True)) for one in read)
    if name == "excluded":
        return all(column < mesh.replicas for column in read)
    return True


def place_in(said: Any, mesh: Mesh) -> dict[str, Any] | None:
    """Where a worker runs, from an entry of ``who``; None for what is none."""
    if not isinstance(said, dict) or fit([said.get("stage"), said.get("replica")], Worker, "", mesh) is UNREADABLE:
        return None
    texts = {name: said[name][:200] if isinstance(said.get(name), str) else None for name in ("host", "device", "gpu")}
    numbers = {name: said[name] if whole(said.get(name)) else None for name in ("rank", "local_rank")}
    return {"stage": said["stage"], "replica": said["replica"], **numbers, **texts}


def whole(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number from 0."""
    return type(value) is int and 0 <= value < MOST


def _whole_list(value: Any, size: int) -> bool:
    return isinstance(value, list) and len(value) == size and all(map(whole, value))


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGE
