"""The router loss summed along a pipeline is the model's own, gradient included."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from deepspeed_sentinel.hf.router import Router

EXPERTS, TOP_K = 5, 2


@pytest.mark.parametrize("padded", [False, True])
def test_stages_add_up_to_the_loss_of_all_layers(padded):
    generator = torch.Generator().manual_seed(0)
    layers = tuple(torch.randn(12, EXPERTS, generator=generator, requires_grad=True) for _ in range(4))
    mask_BT = (torch.rand(3, 4, generator=generator) < 0.6) if padded else None
    expected = 0.5 * load_balancing_loss_func(layers, EXPERTS, TOP_K, mask_BT)
    expected_gradients = torch.autograd.grad(expected, layers)

    router = Router(EXPERTS, TOP_K, coefficient=0.5)
    sums = router.nothing(torch.device("cpu"))
    for stage in (layers[:1], (), layers[1:]):
        sums = router.add(sums, stage, mask_BT)
    loss = router.loss(sums)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, layers), expected_gradients)


def build(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


SIZE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_only_models_that_add_the_loss_have_a_router():
    assert Router.of(build(LlamaConfig(**SIZE))) is None
    assert Router.of(build(MixtralConfig(**SIZE, num_key_value_heads=2))) is None
    config = MixtralConfig(**SIZE, num_key_value_heads=2, output_router_logits=True, router_aux_loss_coef=0.1)
    assert Router.of(build(config)) == Router(8, 2, 0.1)


def test_another_loss_under_that_name_is_refused(monkeypatch):
    model = build(OlmoeConfig(**SIZE, output_router_logits=True))
    assert Router.of(model) is not None
    module = "transformers.models.olmoe.modeling_olmoe.load_balancing_loss_func"
    monkeypatch.setattr(module, lambda *arguments: 0)
    with pytest.raises(ValueError, match="router loss of OlmoeForCausalLM is not the one of Mixtral"):
        Router.of(model)
