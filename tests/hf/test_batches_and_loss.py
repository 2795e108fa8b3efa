"""Batches: what is dropped, refused and announced. Loss: weighted by tokens over the whole step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from deepspeed_sentinel.engine import access
from deepspeed_sentinel.hf.batches import announce_shapes, label_tokens, to_batch
from deepspeed_sentinel.hf.loss import CausalLMLoss

IDS = torch.arange(8).reshape(2, 4)
BATCH = {"input_ids": IDS, "labels": IDS}


def test_a_mask_without_padding_is_dropped_but_not_beside_position_ids():
    ones = torch.ones_like(IDS)
    assert len(to_batch({**BATCH, "attention_mask": ones})[0]) == 1
    inputs, _ = to_batch({**BATCH, "attention_mask": ones, "position_ids": torch.arange(4)[None]})
    assert [part.dtype for part in inputs] == [torch.int64, torch.int64, torch.bool]
    assert inputs[1].shape == IDS.shape
    inputs, labels = to_batch({**BATCH, "attention_mask": ones.tril()}, num_items_in_batch=7, shares=6)
    assert torch.equal(inputs[1], ones.tril().bool())
    assert [int(part) for part in labels[1:]] == [7, 6]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({**BATCH, "token_type_ids": IDS}, "'token_type_ids'; allowed are input_ids"),
        ({"input_ids": IDS}, "lacks 'labels'.*DataCollatorForLanguageModeling"),
        ({**BATCH, "attention_mask": torch.ones(2, 1, 4, 4)}, r"shape \(2, 1, 4, 4\)"),
    ],
)
def test_other_batches_are_refused(batch, said):
    with pytest.raises(ValueError, match=said):
        to_batch(batch)


def test_the_first_token_of_a_row_is_no_target():
    labels = torch.tensor([[1, 2, -100, 4], [5, -100, -100, -100]])
    assert int(label_tokens([{"labels": labels}, {"labels": labels[:1]}])) == 4


def test_shapes_are_announced_when_they_change_and_always_when_mixed():
    resets = []
    engine = SimpleNamespace(reset_activation_shape=lambda: resets.append(1), dynamic_shape=False)

    def announce(*tokens):
        announce_shapes(engine, [to_batch({"input_ids": IDS[:, :n], "labels": IDS[:, :n]}) for n in tokens])
        return len(resets), engine.dynamic_shape

    assert announce(4, 4) == (1, False)
    assert announce(4, 4) == (1, False)
    assert announce(3, 3) == (2, False)
    assert announce(3, 4) == (3, True)
    assert announce(3, 3) == (4, False)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_the_average_over_micro_batches_and_replicas_is_the_mean_over_all_tokens(micro_batches):
    replicas, generator = 2, torch.Generator().manual_seed(0)
    loss_fn = CausalLMLoss(ForCausalLMLoss, vocabulary=10, router=None)
    given = []
    for index in range(micro_batches * replicas):
        labels = torch.randint(0, 10, (2, 6), generator=generator)
        labels[0, : 1 + index] = -100
        given.append((torch.randn(2, 6, 10, generator=generator), labels))
    items = sum(label_tokens([{"labels": labels}]) for _, labels in given)
    shares = torch.tensor(len(given))
    average = sum(loss_fn(logits, (labels, items, shares)) for logits, labels in given) / len(given)
    logits = torch.cat([logits[:, :-1].flatten(0, 1) for logits, _ in given])
    targets = torch.cat([labels[:, 1:].flatten() for _, labels in given])
    torch.testing.assert_close(average, functional.cross_entropy(logits, targets))
    mean_of_means = sum(loss_fn(logits, labels) for logits, labels in given) / len(given)
    if micro_batches > 1:
        assert abs(mean_of_means - average) > 1e-4


def test_a_custom_loss_is_called_as_by_the_trainer():
    def custom(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].sum() / num_items_in_batch

    loss_fn = CausalLMLoss(ForCausalLMLoss, 10, None, custom)
    assert float(loss_fn(torch.ones(1, 2, 10), (IDS, torch.tensor(5), torch.tensor(3)))) == pytest.approx(12.0)


def test_in_a_twin_step_the_sources_label_tokens_are_counted_once_a_replica():
    loss_fn, generator = CausalLMLoss(ForCausalLMLoss, vocabulary=10, router=None), torch.Generator().manual_seed(0)
    replicas, source, labels = 3, [], []
    for index in range(2):
        labels_BT = torch.randint(0, 10, (2, 6), generator=generator)
        labels_BT[0, : 1 + 2 * index] = -100
        source.append((torch.randn(2, 6, 10, generator=generator), labels_BT))
        # as its step was to be: with the label tokens of all replicas
        labels.append(to_batch({"input_ids": labels_BT, "labels": labels_BT}, 1234, 2 * replicas)[1])
    twin = loss_fn.in_twin_step(labels, replicas)
    average = sum(loss_fn(logits, one) for (logits, _), one in zip(source, twin, strict=True)) / 2
    logits = torch.cat([logits[:, :-1].flatten(0, 1) for logits, _ in source])
    torch.testing.assert_close(
        average, functional.cross_entropy(logits, torch.cat([y[:, 1:].flatten() for _, y in source]))
    )


@pytest.mark.parametrize("labels", [IDS, (IDS,), None])
def test_labels_without_a_number_are_left_alone_in_a_twin_step(labels):
    loss_fn = CausalLMLoss(ForCausalLMLoss, vocabulary=10, router=None)
    assert loss_fn.in_twin_step([labels], 2) == [labels]


@pytest.mark.parametrize(
    ("version", "parts", "divisor"),
    [("0.16.0", {}, 4), ("0.18.2", {}, 4), ("0.19.8", {"_running_engine_backward": False}, 1)],
)
def test_a_gradient_is_averaged_over_micro_batches_once(monkeypatch, version, parts, divisor):
    monkeypatch.setattr("deepspeed.__version__", version)
    engine = SimpleNamespace(micro_batches=1, optimizer=None, **parts)
    loss = CausalLMLoss(ForCausalLMLoss, 8, None)
    loss.gradient_over = access.gradient_divisor(engine)
    engine.micro_batches = 4  # of the step in which it is asked
    logits = torch.randn(2, 4, 8, requires_grad=True)
    value = loss(logits, (IDS, torch.tensor(6), torch.tensor(3)))
    expected = 3 * functional.cross_entropy(logits[:, :-1].reshape(6, 8), IDS[:, 1:].reshape(6), reduction="sum") / 6
    torch.testing.assert_close(value, expected)
    (gradient,), (whole,) = (torch.autograd.grad(one, logits, retain_graph=True) for one in (value, expected))
    torch.testing.assert_close(gradient * divisor, whole)


def test_a_version_that_loses_gradients_of_another_dtype_is_refused():
    engine = SimpleNamespace(optimizer=SimpleNamespace(use_grad_accum_attribute=True))
    with pytest.raises(ValueError, match="loses the gradients of all stages but the last"):
        access.gradient_divisor(engine)


@pytest.mark.parametrize("version", ["0.18.9", "0.19.4"])
def test_versions_that_average_once_a_stage_are_refused(monkeypatch, version):
    monkeypatch.setattr("deepspeed.__version__", version)
    with pytest.raises(ValueError, match=rf"DeepSpeed {version} divides gradients .* Install 0\.19\.8"):
        access.gradient_divisor(SimpleNamespace(_running_engine_backward=False))
