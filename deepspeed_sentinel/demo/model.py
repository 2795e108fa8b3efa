"""The Llama of transformers, module by module, as layers of a DeepSpeed pipeline.

Composed in order, the layers compute what ``LlamaForCausalLM`` computes with the same weights. Only the
hidden state [batch, tokens, hidden] crosses a link.
"""

from __future__ import annotations

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from deepspeed_sentinel.demo.options import DemoOptions


def llama_config(options: DemoOptions) -> LlamaConfig:
    """The model's configuration; attention is causal by sdpa's own flag, so that no mask has to travel."""
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


def _initialise(module: nn.Module, deviation: float) -> None:
    """Weights as transformers draws them: normal for matrices; norms keep their ones."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=deviation)


class LlamaEmbedding(nn.Module):
    """Token ids [batch, tokens] to hidden state [batch, tokens, hidden]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        _initialise(self, config.initializer_range)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(ids_BT)


class LlamaBlock(nn.Module):
    """One decoder layer together with the rotary embeddings that the model would hand it."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.layer = LlamaDecoderLayer(config, index)
        self.rotary = LlamaRotaryEmbedding(config)
        _initialise(self, config.initializer_range)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden_BTH.shape[1], device=hidden_BTH.device).unsqueeze(0)
        return self.layer(
            hidden_BTH,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=self.rotary(hidden_BTH, position_ids=positions),
        )


class LlamaFinalNorm(nn.Module):
    """The norm after the last decoder layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_BTH)


class LlamaHead(nn.Module):
    """Hidden state to logits [batch, tokens, vocabulary]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        _initialise(self, config.initializer_range)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_BTH)


def layer_specs(config: LlamaConfig) -> list[LayerSpec]:
    """All layers in order, not built yet: embedding, decoder layers, norm, head."""
    return [
        LayerSpec(LlamaEmbedding, config),
        *(LayerSpec(LlamaBlock, config, index) for index in range(config.num_hidden_layers)),
        LayerSpec(LlamaFinalNorm, config),
        LayerSpec(LlamaHead, config),
    ]


def next_token_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats a token."""
    return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten())


def _seed(value: int) -> None:
    # DeepSpeed's own function refuses the numpy integers that its "type:" partitioning hands it.
    torch.manual_seed(int(value))


def build(options: DemoOptions) -> PipelineModule:
    """This rank's part of the pipeline; the same weights whenever options and rank are the same."""
    return PipelineModule(
        layers=layer_specs(llama_config(options)),
        num_stages=options.stages,
        loss_fn=next_token_loss,
        partition_method="type:LlamaBlock",
        seed_layers=True,
        seed_fn=_seed,
        base_seed=options.seed + 1234,
        activation_checkpoint_interval=0,
    )
