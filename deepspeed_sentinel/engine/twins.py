"""Twin steps in a pipeline engine: one replica's micro-batches reach the first and the last stage of all columns.

First and last stage load the data, so they alone need to know that a step is a twin step, and they share a secret from
which each step is drawn (``response/twins.py``). Every replica draws its own micro-batches as always, so that loaders
stay in step; the source's inputs then go to the others of the first stage, its labels to the others of the last, over
the stages' own groups. A middle stage takes part in none of it: it learns what the step was with the evidence, when its
last message is sent.

Where the micro-batches of one replica cannot take another's place, the step is none: another shape, where messages are
not announced one by one; or a loader that has come to its end, which then raises as it would without a Sentinel.
"""

from __future__ import annotations

import io
import os
import platform
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.keys import PairSecret
from deepspeed_sentinel.evidence.table import Twins
from deepspeed_sentinel.mesh import Mesh, Worker
from deepspeed_sentinel.response.twins import Draw, chance, draw

_KEY_BYTES = 32
_NONE, _APART, _GIVEN, _SOURCE = range(4)


class TwinSteps:
    """What one rank does for twin steps. Collective to create, in first and last stage.

    Args:
        engine: whose micro-batches.
        mesh, worker: the mesh and this worker.
        control: of the small exchanges.
        config: how often; its seed is that of the secret.
        next_batch: draws this replica's next micro-batch.
    """

    def __init__(
        self,
        engine: PipelineEngine,
        mesh: Mesh,
        worker: Worker,
        control: Control,
        config: SentinelConfig,
        next_batch: Callable[[], Any],
    ) -> None:
        self._engine, self._mesh, self._worker, self._control = engine, mesh, worker, control
        self._config, self._own_next = config, next_batch
        self._at_end = mesh.is_trusted(worker.stage)
        self._waiting: deque[Any] = deque()
        self._ended: StopIteration | None = None
        self._drawn: Draw | None = None
        self._secret = PairSecret(self._agree_on_key(config.seed)) if self._at_end and mesh.replicas > 1 else None

    def possible(self, suspicion: bool) -> bool:
        """Whether the step may be a twin step, as all ranks know."""
        return chance(self._config, self._mesh.replicas, suspicion) > 0

    def begin_step(self, step: int, suspicion: bool) -> None:
        """Draw what the step is, and hand micro-batches over if it is a twin step. Collective in first and last stage.

        Args:
            step: the engine's global step.
            suspicion: somebody is suspected.
        """
        self._drawn = None
        self._waiting.clear()
        if self._secret is None or not self.possible(suspicion):
            return
        drawn = draw(self._config, self._mesh.replicas, suspicion, self._secret.number("twins", step))
        if drawn is None:
            return
        self._ended = None
        while len(self._waiting) < self._engine.micro_batches and self._ended is None:
            try:
                self._waiting.append(self._own_next())
            except StopIteration as end:
                self._ended = end
        if not self._exchangeable(drawn):
            return
        theirs = self._of_source(drawn)
        if drawn.given[self._worker.replica]:
            self._waiting = deque(self._in_place(own, given) for own, given in zip(self._waiting, theirs, strict=True))
        self._drawn = drawn

    def next_batch(self) -> Any:
        """What this replica is given next: ``engine._next_batch``."""
        if self._waiting:
            return self._waiting.popleft()
        if self._ended is not None:
            ended, self._ended = self._ended, None
            raise ended
        return self._own_next()

    @property
    def word(self) -> int:
        """What this rank tells all others of the step, for its column: see ``as_told``."""
        if self._drawn is None:
            return _NONE
        if self._worker.replica == self._drawn.source:
            return _SOURCE
        return _GIVEN if self._drawn.given[self._worker.replica] else _APART

    def _agree_on_key(self, seed: int | None) -> bytes:
        """32 bytes that first and last stage share and nobody else is told."""
        if seed is None:
            key = os.urandom(_KEY_BYTES)
        else:
            hkdf = HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=b"deepspeed_sentinel/twins/1")
            key = hkdf.derive(str(seed).encode())
        mine = torch.frombuffer(bytearray(key), dtype=torch.uint8)
        if self._worker.stage == 0:
            mine = self._control.of_replica(mine, 0)
        theirs = self._control.swap_ends(mine)
        return bytes((mine if self._worker.stage == 0 else theirs).tolist())

    def _exchangeable(self, drawn: Draw) -> bool:
        """Whether every column can take the source's micro-batches, as first and last stage find alike."""
        word = 0 if self._ended is not None else _layout(list(self._waiting))
        mine = torch.tensor([word, int(self._engine.dynamic_shape)])
        words_R2 = self._control.of_row(mine)[torch.from_numpy(drawn.given)]
        same = bool((words_R2[:, 0] == words_R2[0, 0]).all()) or bool(words_R2[:, 1].all())
        fit = bool((words_R2[:, 0] != 0).all()) and same
        return fit and bool(self._control.swap_ends(torch.tensor([int(fit)], dtype=torch.uint8)))

    def _of_source(self, drawn: Draw) -> list[Any]:
        """The source's part for this stage of each micro-batch, on the CPU."""
        part = 0 if self._worker.stage == 0 else 1
        mine = torch.empty(0, dtype=torch.uint8)
        if self._worker.replica == drawn.source:
            mine = _to_bytes([_map(batch[part], lambda tensor: tensor.detach().cpu()) for batch in self._waiting])
        given = _from_bytes(self._control.of_replica(mine, drawn.source))
        if not isinstance(given, list) or len(given) != self._engine.micro_batches:
            raise SentinelError(
                f"replica {drawn.source} of stage {self._worker.stage} handed over no {self._engine.micro_batches} "
                "micro-batches in a twin step. Resume from the last checkpoint without it."
            )
        return given

    def _in_place(self, own: Any, given: Any) -> Any:
        """A micro-batch in which this stage's part is another replica's."""
        return (given, *own[1:]) if self._worker.stage == 0 else (own[0], given)


def kind(device: torch.device) -> int:
    """A number for the hardware and software that this rank computes with: where they differ, so may last bits."""
    parts: list[object] = [torch.__version__]
    if device.type == "cpu":
        parts += [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    else:
        parts += [torch.get_device_module(device).get_device_name(device), torch.version.cuda, torch.version.hip]
    return zlib.crc32(" ".join(map(str, parts)).encode())


def norm_bits(tensors: Sequence[torch.Tensor]) -> int:
    """The bits of the norm of all these together, a float64, as a whole number."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64) for tensor in tensors]
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64)
    return int(total.view(torch.int64))


def as_told(words_SR: np.ndarray, gradients_SR: np.ndarray, norms_SR: np.ndarray, kinds_SR: np.ndarray) -> Twins | None:
    """What first and last stage say of a step: a twin step, or None.

    Their words are one a column, so a column is one of those that share micro-batches if both its ends say so.

    Args:
        words_SR: int64 [S, R], the words of all ranks; those of middle stages mean nothing.
        gradients_SR: int64 [S, R], digests of accumulated gradients; norms_SR: float64 [S, R], their norms.
        kinds_SR: int64 [S, R], see ``kind``.

    Raises:
        SentinelError: they say different things.
    """
    first, last = words_SR[0], words_SR[-1]
    same, sources = np.array_equal(first, last), np.flatnonzero(first == _SOURCE)
    if same and (first == _NONE).all():
        return None
    if not same or (first == _NONE).any() or sources.size != 1:
        raise SentinelError(
            f"first and last stage say different things of one step: {first.tolist()} and {last.tolist()} (0 is no "
            "twin step, 1 a column with data of its own, 2 one that was given another's, 3 that one). Nothing of this "
            "step was applied. Resume from the last checkpoint."
        )
    return Twins(int(sources[0]), first >= _GIVEN, gradients_SR, norms_SR, kinds_SR)


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Tensors in nested tuples, lists and dicts replaced."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(one, function) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_map(one, function) for one in value)
    return value


def _layout(batches: list[Any]) -> int:
    """A checksum of what batches are made of, never 0."""
    described: list[str] = []

    def describe(tensor: torch.Tensor) -> torch.Tensor:
        described.append(f"{tensor.dtype} {tuple(tensor.shape)}")
        return tensor

    for batch in batches:
        _map(batch, describe)
        described.append("/")
    return 1 + zlib.crc32(" ".join(described).encode())


def _to_bytes(batches: list[Any]) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(batches, file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def _from_bytes(file_N: torch.Tensor) -> Any:
    return torch.load(io.BytesIO(file_N.numpy().tobytes()), map_location="cpu", weights_only=True)
