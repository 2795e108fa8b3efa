"""The text that the simulated columns learn from: Python's own standard library, tokenised once and kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from deepspeed_sentinel import corpus
from deepspeed_sentinel.simulation.options import SimulationOptions

HELD_OUT_SEQUENCES = 64
_BYTES = 256


def cache_folder() -> Path:
    """Where tokens are kept: below ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepspeed_sentinel"


def prepare(vocabulary: int) -> tuple[Path, str]:
    """(folder, tokenizer) of the tokenised text; tokenises it on first use."""
    tokenizer = "byte" if vocabulary == _BYTES else "bpe"
    folder = cache_folder() / f"corpus_{tokenizer}_{vocabulary}"
    corpus.prepare(folder, tokenizer, vocabulary)
    return folder, tokenizer


class Text:
    """Training batches of all columns, and held-out sequences.

    Each column draws its own windows of the text, by seed and column alone.
    """

    def __init__(self, options: SimulationOptions) -> None:
        folder, tokenizer = prepare(options.size.vocabulary)
        self._options = options
        train = corpus.load(folder, tokenizer, "train")
        size = options.micro_batches * options.micro_batch_size
        self._columns: list[Iterator[tuple[torch.Tensor, torch.Tensor]]] = [
            corpus.batches(train, seed=options.seed, replica=column, size=size, sequence=options.sequence)
            for column in range(options.replicas)
        ]
        self._held_out = corpus.load(folder, tokenizer, "held_out")

    def next_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, int64 [C, M, B, T]."""
        drawn = [next(column) for column in self._columns]
        shape = (self._options.replicas, self._options.micro_batches, self._options.micro_batch_size, -1)
        ids, labels = (torch.stack(part).view(shape).to(self._options.device) for part in zip(*drawn, strict=True))
        return ids, labels

    def held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, int64 [64, T]: the same in all runs, whatever their seed."""
        (ids, labels) = next(
            corpus.batches(self._held_out, seed=0, replica=0, size=HELD_OUT_SEQUENCES, sequence=self._options.sequence)
        )
        return ids.to(self._options.device), labels.to(self._options.device)
