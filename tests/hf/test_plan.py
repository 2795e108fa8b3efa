"""Which models can be cut, where, and what is said of those that cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from deepspeed_sentinel.hf.plan import PassThrough, Plan
from deepspeed_sentinel.hf.weights import Given, Pretrained, resolve

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def model_of(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_the_pieces_follow_the_flow_of_data():
    plan = Plan.of(model_of(LlamaConfig(**SMALL)))
    layers = [f"model.layers.{index}" for index in range(3)]
    assert plan.pieces == ("model.embed_tokens", *layers, "model.norm", "lm_head")
    assert [plan.pieces[index] for index in plan.layers] == layers
    assert plan.tied is None


def test_other_names_and_a_tied_head_are_found():
    config = GPTNeoXConfig(**{**SMALL, "num_key_value_heads": None}, tie_word_embeddings=True)
    plan = Plan.of(model_of(config))
    assert plan.pieces[:2] == ("gpt_neox.embed_in", "gpt_neox.emb_dropout")
    assert plan.head in ("lm_head", "embed_out")  # in transformers 5.23 and in 5.3
    assert plan.tied == (f"{plan.head}.weight", "gpt_neox.embed_in.weight")


def test_reading_the_plan_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    Plan.of(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_model_without_a_plan_is_refused():
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel cannot be split.*GPT2Config declares no base_model_pp_plan"):
        Plan.of(model_of(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64)))


class Scaled(LlamaModel):
    def forward(self, inputs_embeds, **others):
        return super().forward(inputs_embeds=12.0 * inputs_embeds, **others)


def test_a_forward_that_does_more_between_the_pieces_is_refused():
    model = model_of(LlamaConfig(**SMALL))
    Plan.of(model)
    model.model.__class__ = Scaled
    with pytest.raises(ValueError, match="without them the hidden state is changed"):
        Plan.of(model)


def test_parameters_outside_the_plan_are_named():
    model = model_of(LlamaConfig(**SMALL))
    model.model.extra = nn.Linear(4, 4, device="meta")
    with pytest.raises(ValueError, match=r"model\.extra\.weight, model\.extra\.bias would be needed"):
        Plan.of(model)


def test_encoder_decoders_and_headless_models_are_refused():
    config = T5Config(vocab_size=64, d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)
    with torch.device("meta"):
        encoder_decoder, headless = T5ForConditionalGeneration(config), LlamaModel(LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match="encoder-decoder"):
        Plan.of(encoder_decoder)
    with pytest.raises(ValueError, match="encoder-decoder"):
        resolve(config, 0, {})
    with pytest.raises(ValueError, match="not a causal LM: load it with AutoModelForCausalLM"):
        Plan.of(headless)


def test_what_is_left_out_hands_on_the_hidden_state_and_still_answers():
    layer = nn.Linear(2, 2)
    layer.attention_type = "sliding"
    there = PassThrough(layer)
    x = torch.randn(2, 2)
    assert there(x, attention_mask=None) is x
    assert there.attention_type == "sliding"
    assert list(there.parameters()) == []


def test_where_weights_come_from(tmp_path):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    assert isinstance(resolve(model, 0, {})[1], Given)
    model.save_pretrained(tmp_path)
    hollow, source = resolve(tmp_path, 0, {})
    assert isinstance(source, Pretrained)
    assert all(parameter.is_meta for parameter in hollow.parameters())
    with pytest.raises(ValueError, match="got int"):
        resolve(3, 0, {})


def test_a_stage_reads_its_own_weights_and_misses_what_is_not_there(tmp_path):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path)
    hollow, source = resolve(tmp_path, 0, {})
    plan = Plan.of(hollow)
    for name in plan.pieces[:2]:
        hollow.set_submodule(name, PassThrough(hollow.get_submodule(name)))
    source.fill(hollow, plan, range(2, len(plan.pieces)))
    for name, parameter in hollow.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert "model.layers.0.mlp.up_proj.weight" not in dict(hollow.named_parameters())
    assert torch.equal(hollow.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)

    larger = model_of(LlamaConfig(**{**SMALL, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"model\.layers\.3\..* is missing or has another shape"):
        source.fill(larger, Plan.of(larger), range(6))
