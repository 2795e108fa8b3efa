"""The text that the simulated columns learn from, tokenised once and kept, and the honest changes it goes through."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from deepspeed_sentinel import corpus
from deepspeed_sentinel.simulation.kinds import KINDS, tokens
from deepspeed_sentinel.simulation.options import SimulationOptions

HELD_OUT_SEQUENCES = 64
_BYTES = 256
_BETWEEN_CROSSINGS = 12
_BETWEEN_SPIKES = 10
_TEXT, _NOISE = -1, -2  # beside the numbers of the kinds
_SPELL_STARTS, _SPELL_ENDS = 1.0 / 25.0, 1.0 / 12.0  # chances in a step


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
        self._train = corpus.load(folder, tokenizer, "train")
        self._generators = [np.random.default_rng([options.seed, column]) for column in range(options.replicas)]
        self._contents = Contents(options.change, options.change_at, options.replicas, options.seed)
        self._kinds = [] if options.change == "none" else [tokens(folder, tokenizer, kind) for kind in KINDS]
        self._held_out = corpus.load(folder, tokenizer, "held_out")
        self._step = 0

    def next_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, int64 [C, M, B, T]."""
        sequence = self._options.sequence
        if self._options.change == "sequence" and self._step < self._options.change_at:
            sequence //= 2
        drawn = [self._draw(column, content, sequence) for column, content in enumerate(self._contents.next_step())]
        self._step += 1
        shape = (self._options.replicas, self._options.micro_batches, self._options.micro_batch_size, -1)
        ids, labels = (torch.stack(part).view(shape).to(self._options.device) for part in zip(*drawn, strict=True))
        return ids, labels

    def held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, int64 [64, T]: the same in all runs, whatever their seed."""
        (ids, labels) = next(
            corpus.batches(self._held_out, seed=0, replica=0, size=HELD_OUT_SEQUENCES, sequence=self._options.sequence)
        )
        return ids.to(self._options.device), labels.to(self._options.device)

    def _draw(self, column: int, content: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator, size = self._generators[column], self._options.micro_batches * self._options.micro_batch_size
        if content == _NOISE:
            noise = generator.integers(0, self._options.size.vocabulary, (size, sequence + 1))
            return torch.from_numpy(noise[:, :-1].copy()), torch.from_numpy(noise[:, 1:].copy())
        source = self._train if content == _TEXT else self._kinds[content]
        return corpus.windows(source, generator, size, sequence)


class Contents:
    """What each column learns from, step by step: the text, a kind of its own, or a batch of noise.

    Args:
        change: one of the option's choices; those that are not about content leave the text as it is.
        change_at: its first step.
        columns: how many.
        seed: of who gets what and when.
    """

    def __init__(self, change: str, change_at: int, columns: int, seed: int) -> None:
        self._change, self._change_at = change, change_at
        self._generator = np.random.default_rng((seed, 3))
        self._kind_of = np.resize(self._generator.permutation(len(KINDS)), columns)
        self._order = self._generator.permutation(columns)
        self._now = np.full(columns, _TEXT)
        self._step = 0

    def next_step(self) -> list[int]:
        """Of each column, a kind's number; -1 is the text, -2 noise."""
        since = self._step - self._change_at
        self._step += 1
        if self._change == "kinds":
            self._now = self._kind_of
        elif since < 0:
            return self._now.tolist()
        elif self._change == "crossing":
            crossed = self._order[: 1 + since // _BETWEEN_CROSSINGS]
            self._now[crossed] = self._kind_of[0]
        elif self._change == "turn":
            self._now[:] = self._kind_of[0]
        elif self._change == "spells":
            self._spells()
        elif self._change in ("spike", "spikes"):
            self._now[:] = _TEXT
            if since % _BETWEEN_SPIKES == 0:
                turn = since // _BETWEEN_SPIKES % len(self._now)
                self._now[self._order[turn] if self._change == "spike" else slice(None)] = _NOISE
        return self._now.tolist()

    def _spells(self) -> None:
        drawn, kinds = self._generator.random(len(self._now)), self._generator.integers(len(KINDS), size=len(self._now))
        starts = (self._now == _TEXT) & (drawn < _SPELL_STARTS)
        ends = (self._now != _TEXT) & (drawn < _SPELL_ENDS)
        self._now = np.where(starts, kinds, np.where(ends, _TEXT, self._now))
