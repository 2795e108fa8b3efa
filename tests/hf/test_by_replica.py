"""The Trainer's loss is scaled by replicas in all versions of transformers."""

from types import SimpleNamespace

import pytest
import torch

from deepspeed_sentinel.hf.by_replica import TrainerByReplica


class Counting(TrainerByReplica):
    """Two stages of three replicas, without the Trainer's own start."""

    def __init__(self, across):
        self.args = SimpleNamespace(average_tokens_across_devices=across, n_gpu=1)
        self.accelerator = SimpleNamespace(num_processes=6)
        self.label_smoother = self.compute_loss_func = None
        self.model_accepts_loss_kwargs = True

    def get_tp_size(self):
        return 2


@pytest.mark.parametrize(("across", "items", "times"), [(True, 5, 3), (False, 5, 1), (True, None, 1)])
def test_the_loss_is_multiplied_by_the_replicas(across, items, times):
    def model(labels, **given):
        return {"loss": torch.tensor(7.0)}

    model.training = True

    count = None if items is None else torch.tensor(items)
    trainer, inputs = Counting(across), {"labels": torch.zeros(1, 2)}
    assert float(trainer.compute_loss(model, dict(inputs), num_items_in_batch=count)) == 7 * times
    loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True, num_items_in_batch=count)
    assert float(loss) == 7 * times and "loss" in outputs
