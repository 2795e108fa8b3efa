"""What compute_loss is given on the last stage, and what it may not do there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.loss.loss_utils import ForCausalLMLoss

from deepspeed_sentinel.hf.by_replica import TrainerByReplica
from deepspeed_sentinel.hf.compute_loss import ComputeLoss, ModelOutputs, labelled
from deepspeed_sentinel.hf.loss import CausalLMLoss
from deepspeed_sentinel.hf.steps import MicroBatch, training_batches

IDS = torch.arange(8).reshape(2, 4)
BATCH = {"input_ids": IDS, "labels": IDS.clone(), "weight": torch.ones(2)}
LOGITS = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
OWN = CausalLMLoss(ForCausalLMLoss, vocabulary=10, router=None)


@pytest.fixture(scope="module")
def stage_model():
    config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def outputs_of(stage_model):
    return ModelOutputs(stage_model, OWN, (LOGITS,), BATCH)


def test_the_model_hands_out_logits_and_with_labels_the_loss(stage_model):
    assert outputs_of(stage_model)(input_ids=IDS).loss is None
    outputs = outputs_of(stage_model)(input_ids=IDS, labels=BATCH["labels"], num_items_in_batch=torch.tensor(3))
    assert outputs["logits"] is LOGITS
    torch.testing.assert_close(outputs["loss"], OWN(LOGITS, BATCH["labels"]) * 6 / 3)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"input_ids": IDS + 1}, "input_ids"),
        ({"labels": IDS}, "input_ids"),
        ({"input_ids": IDS, "weight": BATCH["weight"]}, "weight"),
        ({"input_ids": IDS, "output_hidden_states": True}, "output_hidden_states"),
    ],
)
def test_another_forward_pass_than_was_made_is_refused(stage_model, given, named):
    with pytest.raises(ValueError, match=f"called the model with another '{named}'"):
        outputs_of(stage_model)(**given)


def test_a_second_forward_pass_is_refused(stage_model):
    model = outputs_of(stage_model)
    model(input_ids=IDS)
    with pytest.raises(ValueError, match="a second time in one micro-batch"):
        model(input_ids=IDS)


def test_parameters_are_on_no_single_stage(stage_model):
    with pytest.raises(AttributeError, match="asked the model for 'parameters'"):
        outputs_of(stage_model).parameters()


def evaluated(stage_model, compute):
    loss = ComputeLoss(OWN, stage_model, compute)
    names, tensors = labelled(BATCH, None, 1.0)
    loss.expect(names, evaluates=True)
    return loss(LOGITS, tensors)


def test_other_logits_than_the_models_are_refused_in_evaluation(stage_model):
    def other(model, inputs, return_outputs, num_items_in_batch):
        outputs = model(input_ids=inputs["input_ids"])
        return outputs.logits.mean(), {"logits": 2 * outputs.logits}

    with pytest.raises(ValueError, match="returned other outputs than the model's"):
        evaluated(stage_model, other)


def test_only_tensors_reach_the_last_stage():
    with pytest.raises(ValueError, match="a batch has 'text', a list; only tensors"):
        labelled({"text": ["a"]}, None, 1.0)


def test_columns_that_differ_within_a_step_are_named():
    class Fake:
        loss_is_scaled_for_ga = True
        args = SimpleNamespace(average_tokens_across_devices=True)

        def compute_loss(self):
            pass

    step = [MicroBatch(batch, None, 2) for batch in ({"input_ids": IDS, "weight": torch.ones(2)}, {"input_ids": IDS})]
    with pytest.raises(ValueError, match="micro-batches of one step have different columns: weight"):
        training_batches(Fake(), ComputeLoss(OWN, None, None), step, replicas=2)


def held(counts, together, of_all):
    """Micro-batches of a step with so many label tokens each, read for steps of so many."""
    step = []
    for count, size, items in zip(counts, together, of_all, strict=True):
        labels = torch.full((1, 9), -100)
        labels[0, 1 : 1 + count] = 3
        step.append(MicroBatch({"input_ids": torch.ones_like(labels), "labels": labels}, torch.tensor(items), size))
    return step


@pytest.mark.parametrize(("across", "times"), [(True, 3), (False, 1)])
def test_in_a_twin_step_the_sources_label_tokens_count_in_the_number_of_every_replica(across, times):
    """Two micro-batches that an epoch left over, and three of the next step: each with the number of its own."""
    args = SimpleNamespace(average_tokens_across_devices=across)
    trainer = SimpleNamespace(
        args=args, compute_loss_func=None, model_accepts_loss_kwargs=True, loss_is_scaled_for_ga=None, compute_loss=None
    )
    trainer.compute_loss = TrainerByReplica.compute_loss.__get__(trainer)
    given = []

    def compute(model, inputs, num_items_in_batch):
        assert set(inputs) == {"labels"}
        given.append(int(num_items_in_batch))
        return torch.zeros(())

    loss = ComputeLoss(OWN, SimpleNamespace(config=None, training=True), compute)
    step = held([1, 2, 3, 4, 5], [2, 2, 3, 3, 3], [50, 50, 60, 60, 60])
    labels = [last for _, last in training_batches(trainer, loss, step, replicas=3)]
    for one in labels:
        loss(LOGITS, one)
    assert given == [50, 50, 60, 60, 60]
    given.clear()
    for one in loss.in_twin_step(labels, replicas=3):
        loss(LOGITS, one)
    assert given == [times * 3, times * 3, times * 12, times * 12, times * 12]


def test_where_nothing_is_counted_a_twin_step_changes_nothing():
    loss = ComputeLoss(OWN, None, None)
    names, tensors = labelled(BATCH, None, 2.0)
    loss.expect(names, evaluates=False)
    assert loss.in_twin_step([tensors], replicas=2) == [tensors]
