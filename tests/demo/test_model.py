import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

from transformers import LlamaForCausalLM

from deepspeed_sentinel.demo import model
from deepspeed_sentinel.demo.options import DemoOptions

SMALL = DemoOptions(layers=4, hidden=32, intermediate=48, heads=4, key_value_heads=2, sequence=24)


def test_the_loss_is_the_models_own_on_labels_that_are_one_token_ahead():
    whole = LlamaForCausalLM(model.llama_config(SMALL)).eval()
    ids = torch.randint(0, SMALL.vocabulary, (3, 25))
    loss = model.next_token_loss(whole(input_ids=ids[:, :-1], use_cache=False), ids[:, 1:], num_items_in_batch=None)
    torch.testing.assert_close(loss, whole(input_ids=ids, labels=ids, use_cache=False).loss, rtol=1e-5, atol=1e-5)


def test_default_model_has_a_few_million_parameters():
    with torch.device("meta"):
        whole = LlamaForCausalLM(model.llama_config(DemoOptions()))
    assert 2e6 < sum(parameter.numel() for parameter in whole.parameters()) < 8e6
