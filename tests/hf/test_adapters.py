"""Which PEFT models can be split, and what is said of those that cannot."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from deepspeed_sentinel.hf.adapters import taken_apart

SIZE = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def model(**options):
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, **options))


def lora(**options):
    return LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **options})


def test_a_peft_model_is_the_model_with_adapters_in_it():
    base = model()
    assert taken_apart(base) == (base, None)
    peft_model = get_peft_model(base, lora(use_dora=True, modules_to_save=["lm_head"]))
    whole, kept = taken_apart(peft_model)
    assert whole is base and kept is peft_model
    assert any("lora_A" in name for name, _ in whole.named_parameters())


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
        (IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
        (lora(alora_invocation_tokens=[1]), "aLoRA"),
    ],
)
def test_other_kinds_are_refused_by_name(config, kind):
    with pytest.raises(ValueError, match=f"of kind {kind}; only LoRA can be split"):
        taken_apart(get_peft_model(model(), config))


@pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]}])
def test_adapters_on_tied_embeddings_are_refused(options):
    with pytest.raises(ValueError, match="ties its embeddings, and an adapter is on one of them"):
        taken_apart(get_peft_model(model(tie_word_embeddings=True), lora(**options)))
    assert taken_apart(get_peft_model(model(tie_word_embeddings=False), lora(**options)))[1] is not None


def test_adapters_without_a_peft_model_and_on_the_meta_device_are_refused():
    base = model()
    base.add_adapter(lora())
    with pytest.raises(ValueError, match=r"added by add_adapter\(\) or load_adapter\(\)"):
        taken_apart(base)
    with torch.device("meta"):
        hollow = model()
    with pytest.raises(ValueError, match="meta device, and adapters are drawn when they are made"):
        taken_apart(get_peft_model(hollow, lora()))
