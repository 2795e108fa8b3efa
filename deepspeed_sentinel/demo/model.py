"""The demo's model: a small Llama of transformers as a DeepSpeed pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutput

from deepspeed_sentinel.demo.options import DemoOptions
from deepspeed_sentinel.hf import CausalLMPipeline, to_pipeline


def llama_config(options: DemoOptions) -> LlamaConfig:
    """The model's configuration."""
    return LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads,
        max_position_embeddings=max(options.sequence, 128),
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def next_token_loss(outputs: CausalLMOutput, labels_BT: torch.Tensor, **_: Any) -> torch.Tensor:
    """Mean cross-entropy in nats a token; the corpus hands out labels that are one token ahead already."""
    assert outputs.logits is not None
    return functional.cross_entropy(outputs.logits.flatten(0, 1).float(), labels_BT.flatten())


def build(options: DemoOptions) -> CausalLMPipeline:
    """This rank's part of the pipeline; the same weights whenever options and rank are the same."""
    return to_pipeline(
        llama_config(options), options.stages, compute_loss_func=next_token_loss, seed=options.seed + 1234
    )
