"""Rows of the messages of a step, on the device: what the probe writes message by message, and what is made of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.kernels.keyed_digest import DigestKey
from deepspeed_sentinel.kernels.observe_message import observe_message
from deepspeed_sentinel.kernels.sliced_wasserstein import DIRECTIONS, QUANTILES, sliced_wasserstein
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS, TOKENS, sketch_rows, token_sketch

PUBLIC = 0  # the sketch whose sample and projection both ends of every link share


@dataclass(frozen=True)
class EndStatistics:
    """One part of all messages of a step at one end of a link.

    In the unit of an unscaled mean-loss gradient or activation. A message that has no such part, or one of another
    hidden size, has NaN.

    Attributes:
        means_MD: float32, mean over the tokens.
        quantiles_MQ: float32, projected quantiles.
        scalars_M3: float32, mean square, largest magnitude, non-finite count.
    """

    means_MD: torch.Tensor
    quantiles_MQ: torch.Tensor
    scalars_M3: torch.Tensor


class Buffers:
    """The step's rows of one part at one end, one a micro-batch. Sketches of short messages fill their first tokens.

    Attributes:
        hidden: D.
        tokens: of each micro-batch's message, 0 where nothing was read.
        sketch_JMmK, norms_JMm: float32, the sketches of every job.

    Args:
        micro_batches: M.
        hidden: D.
        jobs: J, sketches of each message.
        device: where messages live.
    """

    def __init__(self, micro_batches: int, hidden: int, jobs: int, device: torch.device) -> None:
        # Zeros, because sketches of short messages leave rows that travel all the same.
        def blank(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.hidden = hidden
        self.tokens = [0] * micro_batches
        self.sketch_JMmK = blank(jobs, micro_batches, TOKENS, DIMENSIONS)
        self.norms_JMm = blank(jobs, micro_batches, TOKENS)
        self._column_sums_MD = blank(micro_batches, hidden)
        self._scalars_M3 = blank(micro_batches, 3)

    def read(
        self,
        micro_batch: int,
        x_TD: torch.Tensor,
        seeds_J2: torch.Tensor,
        digest_2: torch.Tensor,
        key: DigestKey | None,
        keyed_1: torch.Tensor | None,
    ) -> None:
        """Read a message. Nothing waits for the device.

        Args:
            micro_batch: row to write.
            x_TD: the message, T >= 1.
            seeds_J2: int64, sample and projection seed of each sketch.
            digest_2: int32, out: its digest.
            key, keyed_1: of the keyed digest, int64, out; both or neither.
        """
        self.tokens[micro_batch] = x_TD.shape[0]
        rows = sketch_rows(x_TD.shape[0])
        observe_message(
            x_TD,
            seeds_J2,
            self._column_sums_MD[micro_batch],
            self._scalars_M3[micro_batch],
            digest_2,
            self.sketch_JMmK[:, micro_batch, :rows],
            self.norms_JMm[:, micro_batch, :rows],
            key=key,
            keyed_1=keyed_1,
        )

    def read_sketches(self, micro_batch: int, x_TD: torch.Tensor, seeds_J2: torch.Tensor, jobs: slice) -> None:
        """Put some sketches of another message, as large as the one that was read, in place of that one's."""
        rows = sketch_rows(self.tokens[micro_batch])
        token_sketch(
            x_TD,
            seeds_J2[jobs],
            self.sketch_JMmK[jobs, micro_batch, :rows],
            self.norms_JMm[jobs, micro_batch, :rows],
        )

    def statistics(self, scale: float) -> EndStatistics:
        """The rows; ``scale`` undoes gradient accumulation and loss scaling."""
        counts = torch.tensor(self.tokens, dtype=torch.float32)
        tokens_M1 = counts.to(self._scalars_M3.device, non_blocking=True)[:, None]
        energy, max_abs, non_finite = self._scalars_M3.unbind(1)
        mean_square = energy / (tokens_M1[:, 0] * self.hidden) * scale**2
        statistics = EndStatistics(
            means_MD=self._column_sums_MD / tokens_M1 * scale,
            quantiles_MQ=self._quantiles() * scale,
            scalars_M3=torch.stack([mean_square, max_abs * scale, non_finite], dim=1),
        )
        if all(self.tokens):
            return statistics
        absent_M1 = tokens_M1 == 0
        return EndStatistics(*(rows.masked_fill(absent_M1, torch.nan) for rows in vars(statistics).values()))

    def _quantiles(self) -> torch.Tensor:
        """Of the public sketches; messages with equally many sketched tokens together, most often all of them."""
        rows_M = [sketch_rows(tokens) for tokens in self.tokens]
        sketch_MmK = self.sketch_JMmK[PUBLIC]
        if len(set(rows_M)) == 1 and rows_M[0]:
            return sliced_wasserstein(sketch_MmK[:, : rows_M[0]], self.hidden)
        one_by_one = [
            sliced_wasserstein(sketch_mK[None, :rows], self.hidden)
            if rows
            else sketch_mK.new_zeros(1, DIRECTIONS * QUANTILES)
            for sketch_mK, rows in zip(sketch_MmK, rows_M, strict=True)
        ]
        return torch.cat(one_by_one)


assert NAMES[4:7] == ("energy", "max_abs", "non_finite"), "scalars_M3 follows the order of the table"
