"""Twin steps in a pipeline engine: one replica's micro-batches reach the first and the last stage of all columns.

First and last stage load the data, so they alone need to know that a step is a twin step, and they share a secret from
which each step is drawn (``response/twins.py``). Every replica draws its own micro-batches as always, so that loaders
stay in step; the source's inputs then go to the others of the first stage, its labels to the others of the last, over
the stages' own groups. A middle stage takes part in none of it: it learns what the step was with the evidence, when its
last message is sent.

Where the micro-batches of one replica cannot take another's place, the step is none: inputs of another shape, where
messages are not announced one by one; other data types; something that is no tensor, number or text; or a loader that
has come to its end, which then raises as it would without a Sentinel, after what it had left.

A loss that divides by what it counts in all replicas' labels must count the source's. So where the pipeline's
``loss_fn`` has ``in_twin_step(labels, replicas)``, the last stage calls it with the source's labels of all
micro-batches, and is given what it returns for them. Gradients and losses are averaged over the columns that take part,
each of which has trained on the same: what is averaged is one column's.
"""

from __future__ import annotations

import os
import platform
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import backends

from deepspeed_sentinel.compat import precisions
from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine.ahead import Ahead
from deepspeed_sentinel.engine.packed import MOST_TEXT, can_be_packed
from deepspeed_sentinel.engine.parcel import checksums, from_bytes, most_bytes, to_bytes, too_much_text
from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.keys import Secret
from deepspeed_sentinel.evidence.step import Twins
from deepspeed_sentinel.evidence.weights import dense_parts
from deepspeed_sentinel.mesh import Mesh, Worker
from deepspeed_sentinel.response.twins import Draw, chance, draw
from deepspeed_sentinel.telemetry import console

_DRIVERS = tuple(Path(f"/sys/module/{name}/version") for name in ("nvidia", "amdgpu"))
_KEY_BYTES = 32
_NONE, _APART, _GIVEN, _SOURCE, _REFUSED = range(5)
# What keeps a step from being a twin step; of several the last counts.
_NOTHING, _SHAPES, _KINDS, _TEXT, _FOREIGN, _UNCOPIED, _ENDED = range(7)
_HINDERED = {
    _SHAPES: "the shapes of inputs differ between replicas, and messages are not announced one by one. Pack or pad to "
    "a fixed length",
    _KINDS: "the data types of micro-batches, or how many tensors their labels are, differ between replicas. Let all "
    "loaders make the same",
    _TEXT: f"the micro-batches of a step hold more than {MOST_TEXT >> 20} MiB of text and plain numbers. Keep them in "
    "tensors",
    _FOREIGN: "a micro-batch holds something else than dense tensors, numbers and text in tuples, lists and dicts",
    _UNCOPIED: "a micro-batch holds something of which copy.deepcopy makes no copy, so none can be drawn ahead",
}


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
        self._config, self._ahead = config, Ahead(engine, next_batch)
        self._at_end = mesh.is_trusted(worker.stage)
        self._wanted = {"twin steps": 0, "replays": 0}
        self._hindered = dict(self._wanted)
        self._drawn: Draw | None = None
        self._refused = False
        self._secret = Secret(self._agree_on_key(config.seed)) if self._at_end and mesh.replicas > 1 else None

    def go_by(self, config: SentinelConfig) -> None:
        """Draw by other settings from the next step on."""
        self._config = config

    @property
    def configured(self) -> bool:
        """Whether any step may ever be a twin step."""
        return self.possible(1.0)

    def possible(self, suspicion: float) -> bool:
        """Whether the step may be a twin step, as all ranks know."""
        return chance(self._config, self._mesh.replicas, suspicion) > 0

    def begin_step(self, step: int, suspicion: float) -> None:
        """Draw what the step is, and hand micro-batches over if it is a twin step. Collective in first and last stage.

        Args:
            step: the engine's global step.
            suspicion: how likely a twin step is for it.
        """
        self._drawn, self._refused = None, False
        self._ahead.forget()
        if self._secret is None or not self.possible(suspicion):
            return
        drawn = draw(self._config, self._mesh.replicas, suspicion, self._secret.number("twins", step))
        if drawn is None:
            return
        self._ahead.draw()
        parts = self._parts()
        if not self._can_be(drawn, parts):
            return
        theirs = self._of_source(drawn, parts)
        if drawn.given[self._worker.replica]:
            pairs = zip(self._ahead.waiting, theirs, strict=True)
            self._ahead.waiting = deque(self._in_place(own, given) for own, given in pairs)
        self._drawn = drawn

    def draw_twice(self) -> int:
        """Have this replica's next micro-batches ready for a rehearsal and for the step itself.

        Returns:
            What this rank finds in the way of it, for ``hinders_replay``.
        """
        if not self._at_end or self._ahead.double():
            return _NOTHING
        return _UNCOPIED if self._ahead.ended is None else _ENDED

    def hinders_replay(self, found: int) -> bool:
        """Whether the step is not rehearsed; every rank is asked, once a step.

        Args:
            found: the largest number that a rank of first and last stage found.
        """
        self._wanted["replays"] += 1
        if found in _HINDERED:
            self._tell_of("replays", _HINDERED[found])
        if found != _NOTHING:
            self._ahead.halve()
        return found != _NOTHING

    def next_batch(self) -> Any:
        """What this replica is given next: ``engine._next_batch``."""
        return self._ahead.next_batch()

    @property
    def is_known(self) -> bool:
        """Whether this worker knows that the step is a twin step."""
        return self._drawn is not None

    @property
    def word(self) -> int:
        """What this rank tells all others of the step, for its column: see ``as_told``."""
        if self._drawn is None:
            return _REFUSED if self._refused else _NONE
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
            mine = self._control.of_replica(mine, 0, most=_KEY_BYTES)
        theirs = self._control.swap_ends(mine)
        return bytes((mine if self._worker.stage == 0 else theirs).tolist())

    def _parts(self) -> list[Any] | None:
        """This stage's part of each micro-batch that it has drawn; None if these are no micro-batches."""
        try:
            return [batch[0 if self._worker.stage == 0 else 1] for batch in self._ahead.waiting]
        except (TypeError, LookupError):
            return None

    def _can_be(self, drawn: Draw, parts: list[Any] | None) -> bool:
        """Whether every column can take the source's micro-batches, as first and last stage find alike."""
        here = self._found_here(drawn, parts)
        # Both ends always say what they found, or one of them would wait for the other.
        there = int(self._control.swap_ends(torch.tensor([here], dtype=torch.uint8)))
        found = max(here, there)
        self._wanted["twin steps"] += 1
        self._refused = found in _HINDERED
        if self._refused:
            self._tell_of("twin steps", _HINDERED[found])
        return found == _NOTHING

    def _found_here(self, drawn: Draw, parts: list[Any] | None) -> int:
        """What all ranks of this stage find in the way of this twin step."""
        own = _NOTHING
        if self._ahead.ended is not None:
            own = _ENDED
        elif self._ahead.uncopied:
            own = _UNCOPIED
        elif parts is None or not can_be_packed(parts):
            own = _FOREIGN
        elif self._worker.replica == drawn.source and too_much_text(parts):
            own = _TEXT
        seen = parts if own == _NOTHING and parts else []
        first = self._worker.stage == 0
        # Labels cross no link, so their shapes may differ; a loss may count on as many of them as its own replica has.
        words = torch.tensor([own, *checksums(seen, shapes=first), int(self._engine.dynamic_shape)])
        own_K, kinds_K, made_K, announced_K = self._control.of_row(words)[torch.from_numpy(drawn.given)].T
        if own_K.any():
            return int(own_K.max())
        if (kinds_K != kinds_K[0]).any():
            return _KINDS
        if (made_K == made_K[0]).all() or announced_K.all():
            return _NOTHING
        return _SHAPES if first else _KINDS

    def _tell_of(self, what: str, hindrance: str) -> None:
        self._hindered[what] += 1
        count = self._hindered[what]
        if self._worker == Worker(0, 0) and count == 10 ** (len(str(count)) - 1):
            console.say(
                f"{count} of {self._wanted[what]} {what} so far could not be made: {hindrance}. What only they show "
                "goes unseen meanwhile. Told of the 1st, 10th, 100th, ..."
            )

    def _of_source(self, drawn: Draw, parts: list[Any] | None) -> list[Any]:
        """The source's part for this stage of each micro-batch, as the loss wants it in a twin step."""
        mine = torch.empty(0, dtype=torch.uint8)
        if self._worker.replica == drawn.source:
            mine = to_bytes(parts or [])
        file_N = self._control.of_replica(mine, drawn.source, most=most_bytes(parts or []))
        try:
            given = from_bytes(file_N, torch.device(self._engine.device))
        except Exception as error:
            raise self._nothing_of(drawn) from error
        if len(given) != self._engine.micro_batches:
            raise self._nothing_of(drawn)
        adapted = getattr(self._engine.module.loss_fn, "in_twin_step", None) if self._worker.stage > 0 else None
        return adapted(given, self._mesh.replicas) if adapted else given

    def _nothing_of(self, drawn: Draw) -> SentinelError:
        return SentinelError(
            f"{Worker(self._worker.stage, drawn.source)} handed over no {self._engine.micro_batches} micro-batches in "
            "a twin step. Resume from the last checkpoint without it."
        )

    def _in_place(self, own: Any, given: Any) -> Any:
        """A micro-batch in which this stage's part is another replica's."""
        mine = 0 if self._worker.stage == 0 else 1
        if isinstance(own, (tuple, list)):
            return (*own[:mine], given, *own[mine + 1 :])
        try:  # DeepSpeed asks of any other class for this stage's part alone
            other = own[1 - mine]
        except (TypeError, LookupError):
            other = None
        return (given, other) if mine == 0 else (other, given)


def kind(device: torch.device) -> int:
    """A number for all that this rank computes with, settings too: where it differs, so may last bits."""
    parts: list[object] = [
        torch.__version__,
        backends.cudnn.version(),
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        torch.get_deterministic_debug_mode(),
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        *precisions(),
        *(path.read_text().strip() for path in _DRIVERS if path.is_file()),
    ]
    if device.type == "cpu":
        parts += [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    else:
        parts += [torch.get_device_module(device).get_device_name(device), torch.version.cuda, torch.version.hip]
    return zlib.crc32(" ".join(map(str, parts)).encode())


def norm_bits(tensors: Sequence[torch.Tensor]) -> int:
    """The bits of the norm of all these together, a float64, as a whole number."""
    elements = [dense_parts(tensor.detach())[-1] for tensor in tensors]
    norms = [torch.linalg.vector_norm(one, dtype=torch.float64) for one in elements]
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64)
    return int(total.view(torch.int64))


def was_refused(words_SR: np.ndarray) -> bool:
    """Whether the step was to be a twin step and could not be one, as most of first and last stage say."""
    ends = words_SR[[0, -1]]
    return 2 * int(np.count_nonzero(ends == _REFUSED)) > ends.size


def as_told(
    words_SR: np.ndarray,
    gradients_SR: np.ndarray,
    norms_SR: np.ndarray,
    kinds_SR: np.ndarray,
    states_SR: np.ndarray | None = None,
) -> Twins | None:
    """What first and last stage say of a step: a twin step, or None.

    Their words are one a column, so a column is one of those that share micro-batches if both its ends say so.

    Args:
        words_SR: int64 [S, R], the words of all ranks; those of middle stages mean nothing.
        gradients_SR: int64 [S, R], digests of accumulated gradients; norms_SR: float64 [S, R], their norms.
        kinds_SR: int64 [S, R], see ``kind``.
        states_SR: int64 [S, R], see ``SharedState.share``; None where nothing keeps a state.

    Raises:
        SentinelError: they say different things.
    """
    first, last = (np.where(said == _REFUSED, _NONE, said) for said in (words_SR[0], words_SR[-1]))
    same, sources = np.array_equal(first, last), np.flatnonzero(first == _SOURCE)
    if same and (first == _NONE).all():
        return None
    if not same or (first == _NONE).any() or sources.size != 1:
        raise SentinelError(
            f"first and last stage say different things of one step: {first.tolist()} and {last.tolist()} (0 is no "
            "twin step, 1 a column with data of its own, 2 one that was given another's, 3 that one). Nothing of this "
            "step was applied. Resume from the last checkpoint."
        )
    return Twins(int(sources[0]), first >= _GIVEN, gradients_SR, norms_SR, kinds_SR, states_SR)
