"""The stages are the model: same loss, same gradients, whatever stands on the links does nothing."""

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralForCausalLM

from deepspeed_sentinel.simulation.model import build_stages, model_config
from deepspeed_sentinel.simulation.pipeline import Wire, held_out_loss, train_pass


def whole_model(options):
    torch.manual_seed(options.seed)
    return (MixtralForCausalLM if options.moe else LlamaForCausalLM)(model_config(options))


@pytest.mark.parametrize("moe", [False, True])
def test_stages_compute_what_the_whole_model_computes(options, moe):
    some = options(moe=moe, stages=5)
    ids = torch.randint(256, (2, 2, 1, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(256, (2, 2, 1, 16), generator=torch.Generator().manual_seed(1))
    stages, model = build_stages(some), whole_model(some)
    assert [len(stage.layers) for stage in stages] == [1, 2, 1, 2, 2]
    losses_CM = train_pass(stages, ids, labels, Wire()).losses_CM
    logits = model(ids.flatten(0, 2)).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels.flatten(0, 2), reduction="none")
    torch.testing.assert_close(losses_CM, expected.mean(1).detach().view(2, 2))
    expected.mean(1).sum().backward()
    ours = {id(weight): weight for stage in stages for weight in stage.parameters()}
    theirs = list(model.parameters())
    assert len(ours) == len(theirs)
    by_shape = sorted(float(weight.grad.norm()) for weight in ours.values())
    torch.testing.assert_close(by_shape, sorted(float(weight.grad.norm()) for weight in theirs), rtol=1e-4, atol=1e-6)
    flat = held_out_loss(stages, ids.flatten(0, 2), labels.flatten(0, 2), at_once=3)
    assert flat == pytest.approx(float(losses_CM.mean()), rel=1e-5)


@pytest.mark.parametrize(("name", "billions"), [("0.6b", 0.6), ("1.2b", 1.2), ("4b", 4.0)])
def test_the_large_sizes_have_the_parameters_they_are_named_for(options, name, billions):
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config(options(model=name, stages=16)))
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(billions * 1e9, rel=0.06)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(options):
    state = torch.get_rng_state()
    first, second, other = (build_stages(options(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    weights = [stages[1].layers[0].mlp.up_proj.weight for stages in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
