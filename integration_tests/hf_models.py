"""Tiny random models of each verified family, and batches as collators make them: padded, packed, labels ignored."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 128
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
MIXED = ["sliding_attention", "full_attention"] * 2


def configs() -> dict[str, PreTrainedConfig]:
    """One config a family; sliding windows are shorter than the sequences, so that masks matter."""
    return {
        "llama": LlamaConfig(**SIZE),
        "llama_tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
        "mistral": MistralConfig(**SIZE, sliding_window=5),
        "qwen2": Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=5, layer_types=MIXED),
        "qwen3": Qwen3Config(**SIZE, head_dim=8),
        "gemma": GemmaConfig(**SIZE, head_dim=8),
        "gemma2": Gemma2Config(**SIZE, head_dim=8, sliding_window=5, layer_types=MIXED, final_logit_softcapping=5.0),
        "phi3": Phi3Config(**SIZE, sliding_window=5, partial_rotary_factor=0.5),
        "gpt_neox": GPTNeoXConfig(
            **{**SIZE, "num_key_value_heads": None}, hidden_dropout=0.0, attention_dropout=0.0, rotary_pct=0.5
        ),
        "olmo": OlmoConfig(**SIZE, clip_qkv=2.0),
        "mixtral": MixtralConfig(
            **SIZE, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5
        ),
        "qwen3_moe": Qwen3MoeConfig(
            **SIZE,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            decoder_sparse_step=1,
            mlp_only_layers=[0],
            output_router_logits=True,
            router_aux_loss_coef=0.5,
        ),
    }


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The whole model in float32, the same whenever the seed is."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).float().train()


def batches(step: int, count: int, kind: str = "padded") -> list[dict[str, torch.Tensor]]:
    """``count`` micro-batches of a step, two rows each.

    Args:
        kind: "plain": input ids and labels; "padded": lengths differ from micro-batch to micro-batch, and rows are
            padded on the right, every third on the left; "packed": position ids start anew within a row.
    """
    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 * step + index)
        tokens = 12 if kind != "padded" else 9 + (step + index) % 4
        ids_BT = torch.randint(3, VOCABULARY, (2, tokens), generator=generator)
        labels_BT = ids_BT.clone()
        labels_BT[0, : 1 + index % 5] = -100
        batch = {"input_ids": ids_BT, "labels": labels_BT}
        if kind == "padded":
            mask_BT = torch.ones_like(ids_BT)
            padding = index % 3 + (index == 1)
            padded = slice(0, padding) if index % 3 == 2 else slice(tokens - padding, tokens)
            mask_BT[1, padded] = 0
            labels_BT[1, padded] = -100
            ids_BT[1, padded] = 0
            batch["attention_mask"] = mask_BT
        if kind == "packed":
            first = 4 + index % 3
            positions_T = torch.cat([torch.arange(first), torch.arange(tokens - first)])
            batch["position_ids"] = positions_T.expand(2, -1).clone()
        made.append(batch)
    return made
