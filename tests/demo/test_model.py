"""The pipeline's layers are the Llama of transformers, not something that resembles it."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

from transformers import LlamaForCausalLM

from deepspeed_sentinel.demo import model
from deepspeed_sentinel.demo.options import DemoOptions

SMALL = DemoOptions(layers=4, hidden=32, intermediate=48, heads=4, key_value_heads=2, sequence=24)


def names_in_the_whole_model(index, name, layers):
    """Where the parameter ``name`` of pipeline layer ``index`` is in LlamaForCausalLM."""
    if index == 0 or index == layers + 1:
        return f"model.{name}"
    if index == layers + 2:
        return name
    return name.replace("layer.", f"model.layers.{index - 1}.", 1)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    config = model.llama_config(SMALL)
    whole = LlamaForCausalLM(config).eval()
    layers = [spec.build() for spec in model.layer_specs(config)]
    weights = whole.state_dict()
    for index, layer in enumerate(layers):
        layer.load_state_dict(
            {name: weights[names_in_the_whole_model(index, name, SMALL.layers)] for name in layer.state_dict()}
        )
    return whole, torch.nn.Sequential(*layers).eval()


def test_composed_layers_give_the_whole_models_logits_and_loss(pair):
    whole, layers = pair
    ids = torch.randint(0, SMALL.vocabulary, (3, 25))
    logits = layers(ids[:, :-1])
    expected = whole(input_ids=ids[:, :-1], use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    loss = model.next_token_loss(logits, ids[:, 1:])
    expected_loss = whole(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)


def test_layers_have_every_parameter_of_the_whole_model(pair):
    whole, layers = pair
    count = sum(parameter.numel() for parameter in whole.parameters())
    assert sum(parameter.numel() for parameter in layers.parameters()) == count


def test_no_position_sees_a_later_token(pair):
    _, layers = pair
    ids = torch.randint(0, SMALL.vocabulary, (1, 24))
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % SMALL.vocabulary
    before, after = layers(ids), layers(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-6)
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 1e-3


def test_default_model_has_a_few_million_parameters():
    layers = [spec.build() for spec in model.layer_specs(model.llama_config(DemoOptions()))]
    count = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    assert 2e6 < count < 8e6
