"""Sizes of the simulated models: plain numbers, so that options can be checked without loading a library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """One model size and the training that suits it.

    Attributes:
        hidden, intermediate, heads, key_value_heads: of the Llama.
        head_dimension: of each attention head; heads need not fill the hidden size.
        layers: decoder layers; a mesh with more stages gets one a stage.
        vocabulary: number of tokens; 256 is bytes, more is a tokenizer trained on the text.
        micro_batches, micro_batch_size, sequence: of each column in each step.
        learning_rate: of AdamW, after a warm-up of ten steps.
    """

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dimension: int
    layers: int
    vocabulary: int
    micro_batches: int
    micro_batch_size: int
    sequence: int
    learning_rate: float


# "small" is the least that the sketch truly projects (64 of 512 dimensions) and samples (256 of 1,024 tokens): thin
# stages, so that a step of 64 workers stays at a few seconds of a CPU. "tiny" is as large as the sketch itself.
# The names of the large ones are their parameters with 16 layers (0.6b, 1.2b) and 32 layers (4b).
SIZES = {
    "tiny": Size(64, 176, 4, 2, 16, 8, 256, 2, 2, 128, 3e-3),
    "small": Size(512, 96, 2, 1, 16, 8, 256, 2, 4, 256, 2e-3),
    "0.6b": Size(1536, 6144, 12, 3, 128, 16, 8192, 2, 1, 512, 3e-4),
    "1.2b": Size(2048, 10240, 16, 4, 128, 16, 8192, 2, 1, 512, 3e-4),
    "4b": Size(3072, 10240, 24, 8, 128, 32, 8192, 2, 1, 512, 2e-4),
}
EXPERTS, EXPERTS_A_TOKEN = 8, 2
