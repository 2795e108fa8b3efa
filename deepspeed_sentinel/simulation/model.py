"""A causal language model of transformers, built from its configuration and cut into stages.

Composed in order, the stages compute what the whole model computes. Only the hidden state crosses a link.

Dimension key: B sequences, T tokens a sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deepspeed_sentinel.simulation.options import SimulationOptions
from deepspeed_sentinel.simulation.sizes import EXPERTS, EXPERTS_A_TOKEN

if TYPE_CHECKING:
    from transformers import MixtralConfig, MixtralForCausalLM


def model_config(options: SimulationOptions) -> LlamaConfig | MixtralConfig:
    """Llama, or Mixtral where a mixture of experts is asked for; attention is causal by sdpa's own flag."""
    size = options.size
    common = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": max(size.layers, options.stages),
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "head_dim": size.head_dimension,
        "max_position_embeddings": max(options.sequence, 128),
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    if not options.moe:
        return LlamaConfig(intermediate_size=size.intermediate, **common)
    from transformers import MixtralConfig

    return MixtralConfig(
        # The same number of weights at work for each token as in the dense model.
        intermediate_size=size.intermediate // EXPERTS_A_TOKEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_A_TOKEN,
        sliding_window=None,
        **common,
    )


class Stage(nn.Module):
    """Consecutive layers of the model; the first stage embeds token ids, the last gives logits.

    Args:
        model: the whole model, whose modules this stage shares.
        layers: which decoder layers.
        first, last: whether it is the first or the last stage.
    """

    def __init__(self, model: LlamaForCausalLM | MixtralForCausalLM, layers: range, first: bool, last: bool) -> None:
        super().__init__()
        self.embedding = model.model.embed_tokens if first else None
        self.layers = nn.ModuleList(model.model.layers[index] for index in layers)
        self.norm = model.model.norm if last else None
        self.head = model.lm_head if last else None
        self.rotary = model.model.rotary_emb

    def forward(self, entered: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [B, T] (first stage) or hidden state [B, T, D] to hidden state or logits [B, T, V] (last)."""
        hidden_BTD = entered if self.embedding is None else self.embedding(entered)
        positions_1T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device).unsqueeze(0)
        rotary = self.rotary(hidden_BTD, position_ids=positions_1T)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, attention_mask=None, position_ids=positions_1T, position_embeddings=rotary)
        if self.norm is None or self.head is None:
            return hidden_BTD
        return self.head(self.norm(hidden_BTD))


def _model_class(moe: bool) -> Any:
    if not moe:
        return LlamaForCausalLM
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM


def build_stages(options: SimulationOptions) -> list[Stage]:
    """The stages of a freshly initialised model; the same weights for the same size, stages and seed."""
    config = model_config(options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = _model_class(options.moe)(config)
    model = model.to(device=options.device, dtype=getattr(torch, options.dtype))
    layers, stages = config.num_hidden_layers, options.stages
    bounds = [layers * stage // stages for stage in range(stages + 1)]
    return [
        Stage(model, range(bounds[stage], bounds[stage + 1]), first=stage == 0, last=stage == stages - 1)
        for stage in range(stages)
    ]
