"""The probe: reads each message once where it passes and keeps its row on the device until the step's end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from deepspeed_sentinel.evidence.table import NAMES, RECEIVED, SENT
from deepspeed_sentinel.kernels.observe_message import observe_message
from deepspeed_sentinel.kernels.sliced_wasserstein import sliced_wasserstein
from deepspeed_sentinel.kernels.tensor_digest import DIGEST_WORDS, tensor_digest
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS, TOKENS, sketch_rows, token_sketch
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh
from deepspeed_sentinel.mesh import DIRECTIONS as DIRECTION_NAMES

PUBLIC = 0  # the sketch whose sample and projection both ends of every link share
SECRET = 1  # the sketch whose sample and projection the neighbours of a stage share, and nobody else
ENDS = ((FORWARD, SENT), (FORWARD, RECEIVED), (BACKWARD, SENT), (BACKWARD, RECEIVED))
End = tuple[int, int]


@dataclass(frozen=True)
class EndStatistics:
    """All messages of a step at one end of a link, in the unit of an unscaled mean-loss gradient or activation.

    Attributes:
        means_MD: float32, mean over the tokens.
        quantiles_MQ: float32, projected quantiles.
        scalars_M3: float32, mean square, largest magnitude, non-finite count.
        digest_M2: int32, of the bits as they were sent.
    """

    means_MD: torch.Tensor
    quantiles_MQ: torch.Tensor
    scalars_M3: torch.Tensor
    digest_M2: torch.Tensor


class _Buffers:
    """The step's rows of one end of a link, one a micro-batch. Sketches of short messages fill their first tokens."""

    def __init__(self, micro_batches: int, hidden: int, jobs: int, device: torch.device) -> None:
        # Zeros, because sketches of short messages leave rows that travel all the same.
        def blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.hidden = hidden
        self.column_sums_MD = blank(micro_batches, hidden)
        self.scalars_M3 = blank(micro_batches, 3)
        self.digest_M2 = blank(micro_batches, DIGEST_WORDS, dtype=torch.int32)
        self.sketch_JMmK = blank(jobs, micro_batches, TOKENS, DIMENSIONS)
        self.norms_JMm = blank(jobs, micro_batches, TOKENS)
        self.tokens = [0] * micro_batches


def judged_index(tensors: Sequence[torch.Tensor]) -> int | None:
    """Which tensor of a message is judged: the first floating-point one, the hidden state by convention."""
    return next((index for index, tensor in enumerate(tensors) if tensor.is_floating_point()), None)


def _as_tokens(message: torch.Tensor) -> torch.Tensor:
    """The message as x_TD."""
    return message.reshape(-1, message.shape[-1]) if message.dim() > 1 else message.reshape(-1, 1)


class Probe:
    """Statistics of the messages that one worker sends and receives in a step.

    Args:
        mesh: the mesh.
        stage: the stage of this worker.
        device: where messages live.
        seed: of the public sketch's sample and projection; the same on all ranks.
    """

    def __init__(self, mesh: Mesh, stage: int, device: torch.device, seed: int) -> None:
        self._device = device
        self._public_J2 = torch.tensor([[seed, seed]], dtype=torch.int64, device=device)
        self._seeds: dict[End, torch.Tensor] = {}
        self._stage = stage
        self._buffers: dict[End, _Buffers] = {}
        self.micro_batches = 0
        first, last = stage == 0, stage == mesh.stages - 1
        absent = {
            (FORWARD, RECEIVED): first,
            (BACKWARD, SENT): first,
            (FORWARD, SENT): last,
            (BACKWARD, RECEIVED): last,
        }
        self.ends = tuple(end for end in ENDS if not absent[end])
        self._next = dict.fromkeys(ENDS, 0)

    def begin_step(self, micro_batches: int, seeds: Mapping[End, torch.Tensor] | None = None) -> None:
        """Start a step of so many micro-batches; rows of the step before are forgotten.

        Args:
            micro_batches: number of messages at each end.
            seeds: per end, int64 [J, 2] on the device, sample and projection seed of each sketch that is taken of
                its messages; row PUBLIC must be equal on all ranks. Ends left out take the public sketch alone.
        """
        self._seeds = {end: (seeds or {}).get(end, self._public_J2) for end in self.ends}
        jobs_changed = any(len(self._seeds[end]) != len(buffers.sketch_JMmK) for end, buffers in self._buffers.items())
        if micro_batches != self.micro_batches or jobs_changed:
            self._buffers.clear()
            self.micro_batches = micro_batches
        self._next = dict.fromkeys(ENDS, 0)

    def next_micro_batch(self, end: End) -> int:
        """Identity of the message about to pass: the n-th of its kind in a step is micro-batch n."""
        index = self._next[end]
        assert index < self.micro_batches, (end, index, self.micro_batches)
        self._next[end] = index + 1
        return index

    def observe(self, end: End, micro_batch: int, tensors: Sequence[torch.Tensor]) -> None:
        """Read one message. Nothing waits for the device.

        Args:
            end: direction, and SENT or RECEIVED.
            micro_batch: row to write.
            tensors: all tensors of the message; the first floating-point one is judged, the others are
                compared by checksum.

        Raises:
            ValueError: no floating-point tensor, no token, or another hidden size than before.
        """
        index = judged_index(tensors)
        if index is None:
            kinds = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors)
            raise ValueError(
                f"{self._name(end)} has no floating-point tensor, got ({kinds}): sentinel judges the hidden state, "
                "so a message must carry one. Let the stages pass it, not token ids alone."
            )
        message = tensors[index]
        x_TD = _as_tokens(message)
        if x_TD.numel() == 0:
            raise ValueError(
                f"{self._name(end)}, micro-batch {micro_batch}, has zero tokens: its shape is "
                f"{tuple(message.shape)}. Drop empty batches before they enter the pipeline."
            )
        buffers = self._buffers_of(end, x_TD)
        buffers.tokens[micro_batch] = x_TD.shape[0]
        rows = sketch_rows(x_TD.shape[0])
        observe_message(
            x_TD,
            self._seeds[end],
            buffers.column_sums_MD[micro_batch],
            buffers.scalars_M3[micro_batch],
            buffers.digest_M2[micro_batch],
            buffers.sketch_JMmK[:, micro_batch, :rows],
            buffers.norms_JMm[:, micro_batch, :rows],
        )
        for position, other in enumerate(tensors):
            if position != index and other.numel():
                buffers.digest_M2[micro_batch].mul_(31).add_(tensor_digest(other))

    def forge_sketch(self, end: End, micro_batch: int, message: torch.Tensor) -> None:
        """For drills: put the secret sketch of another message in place of the observed one's, where there is one.

        Args:
            end, micro_batch: of a message that was observed.
            message: as large as that one.
        """
        buffers, seeds_J2 = self._buffers[end], self._seeds[end]
        if len(seeds_J2) <= SECRET:
            return
        x_TD = _as_tokens(message)
        rows, secret = sketch_rows(x_TD.shape[0]), slice(SECRET, SECRET + 1)
        token_sketch(
            x_TD,
            seeds_J2[secret],
            buffers.sketch_JMmK[secret, micro_batch, :rows],
            buffers.norms_JMm[secret, micro_batch, :rows],
        )

    def end_statistics(self, end: End, scale: float) -> EndStatistics:
        """The rows of one end; ``scale`` undoes gradient accumulation and loss scaling."""
        buffers = self._buffers[end]
        assert self._next[end] == self.micro_batches, (end, self._next[end], self.micro_batches)
        tokens_M1 = torch.tensor(buffers.tokens, dtype=torch.float32).to(self._device, non_blocking=True)[:, None]
        energy, max_abs, non_finite = buffers.scalars_M3.unbind(1)
        mean_square = energy / (tokens_M1[:, 0] * buffers.hidden) * scale**2
        return EndStatistics(
            means_MD=buffers.column_sums_MD / tokens_M1 * scale,
            quantiles_MQ=self._quantiles(buffers) * scale,
            scalars_M3=torch.stack([mean_square, max_abs * scale, non_finite], dim=1),
            digest_M2=buffers.digest_M2,
        )

    def sketches(self, end: End, job: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sketches float32 [M, 256, K] and norms float32 [M, 256] of one end; see ``sketched_rows``."""
        buffers = self._buffers[end]
        return buffers.sketch_JMmK[job], buffers.norms_JMm[job]

    def sketched_rows(self, end: End) -> list[int]:
        """How many rows of each micro-batch's sketch are tokens."""
        return [sketch_rows(tokens) for tokens in self._buffers[end].tokens]

    @staticmethod
    def _quantiles(buffers: _Buffers) -> torch.Tensor:
        """Of the public sketches; messages with equally many sketched tokens together, most often all of them."""
        rows_M = [sketch_rows(tokens) for tokens in buffers.tokens]
        sketch_MmK = buffers.sketch_JMmK[PUBLIC]
        if len(set(rows_M)) == 1:
            return sliced_wasserstein(sketch_MmK[:, : rows_M[0]], buffers.hidden)
        one_by_one = [
            sliced_wasserstein(sketch_mK[None, :rows], buffers.hidden)
            for sketch_mK, rows in zip(sketch_MmK, rows_M, strict=True)
        ]
        return torch.cat(one_by_one)

    def _buffers_of(self, end: End, x_TD: torch.Tensor) -> _Buffers:
        hidden = x_TD.shape[1]
        if end not in self._buffers:
            self._buffers[end] = _Buffers(self.micro_batches, hidden, len(self._seeds[end]), self._device)
        if self._buffers[end].hidden != hidden:
            raise ValueError(
                f"{self._name(end)} changed its hidden size from {self._buffers[end].hidden} to {hidden}: the number "
                "of tokens may change between messages, the hidden size may not."
            )
        return self._buffers[end]

    def _name(self, end: End) -> str:
        verb = "sent" if end[1] == SENT else "received"
        return f"the {DIRECTION_NAMES[end[0]]} message {verb} by stage {self._stage}"


assert NAMES[4:7] == ("energy", "max_abs", "non_finite"), "scalars_M3 follows the order of the table"
