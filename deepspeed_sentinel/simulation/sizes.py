"""Sizes of the simulated models: plain numbers, so that options can be checked without loading a library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """One model size and the training that suits it.

    Attributes:
        hidden, intermediate, heads, key_value_heads: of the Llama.
        layers: decoder layers; a mesh with more stages gets one a stage.
        vocabulary: number of tokens; 256 is bytes, more is a tokenizer trained on the text.
        micro_batches, micro_batch_size, sequence: of each column in each step.
        learning_rate: of AdamW, after a warm-up of ten steps.
    """

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    vocabulary: int
    micro_batches: int
    micro_batch_size: int
    sequence: int
    learning_rate: float


# The names of the large ones are their parameters with 16 layers (0.6b, 1.2b) and 32 layers (4b).
SIZES = {
    "tiny": Size(64, 176, 4, 2, 8, 256, 2, 2, 128, 3e-3),
    "0.6b": Size(1536, 6144, 12, 3, 16, 8192, 2, 1, 512, 3e-4),
    "1.2b": Size(2048, 10240, 16, 4, 16, 8192, 2, 1, 512, 3e-4),
    "4b": Size(3072, 10240, 24, 8, 32, 8192, 2, 1, 512, 2e-4),
}
EXPERTS, EXPERTS_A_TOKEN = 8, 2
