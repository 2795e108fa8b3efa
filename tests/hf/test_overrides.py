"""Subclasses whose methods would not be called: refused by name, with what to do instead."""

from __future__ import annotations

import pytest
from transformers import Trainer, TrainingArguments

from deepspeed_sentinel.hf.overrides import NEVER_CALLED, check_overrides
from deepspeed_sentinel.hf.trainer import SentinelTrainer


def test_every_name_is_a_method_of_the_trainer_that_is_not_replaced():
    for name in NEVER_CALLED:
        assert callable(getattr(Trainer, name))
        assert name not in vars(SentinelTrainer)


def test_a_subclass_is_refused_when_it_is_made(tmp_path):
    class Mine(SentinelTrainer):
        def _clip_grad_norm(self, model):
            return 0.0

    config = {"zero_optimization": {"stage": 0}, "pipeline": {"stages": 1}}
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", deepspeed=config)
    with pytest.raises(ValueError, match=r"would not call these methods.*\n  Mine\._clip_grad_norm: set max_grad_norm"):
        Mine(None, args)


def test_a_mixin_counts_too_and_what_is_called_may_be_overridden():
    class Mixin:
        def _save(self, output_dir=None, state_dict=None):
            pass

    class Called(SentinelTrainer):
        def compute_loss(self, *args, **kwargs):
            pass

        def training_step(self, *args, **kwargs):
            pass

    check_overrides(Called, SentinelTrainer, set())
    with pytest.raises(ValueError, match=r"Mixin\._save: override save_model"):
        check_overrides(type("Both", (Mixin, SentinelTrainer), {}), SentinelTrainer, set())


@pytest.mark.parametrize(("key", "method"), [("optimizer", "create_optimizer"), ("scheduler", "create_scheduler")])
def test_what_the_deepspeed_config_makes_is_not_made_twice(key, method):
    kind = type("Mine", (SentinelTrainer,), {method: lambda self: None})
    check_overrides(kind, SentinelTrainer, {"pipeline"})
    with pytest.raises(ValueError, match=rf'Mine\.{method}: take "{key}" out of the DeepSpeed config'):
        check_overrides(kind, SentinelTrainer, {"pipeline", key})
