import numpy as np
import torch

from deepspeed_sentinel.response.gate import Share


def test_masking_keeps_nan_out_and_the_mean_is_that_of_the_included():
    gradients = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")], [5.0, 8.0]])
    excluded = np.array([False, True, False])
    for column, gradient in enumerate(gradients):
        Share.of(excluded, column).apply_([gradient])
    assert gradients.mean(0).tolist() == [3.0, 5.0]


def test_nobody_excluded_changes_no_bit():
    gradient = torch.tensor([0.1, -0.0, float("nan")])
    before = gradient.clone()
    share = Share.of(np.zeros(3, bool), 1)
    share.apply_([gradient])
    assert share.changes_nothing and torch.equal(gradient.view(torch.int32), before.view(torch.int32))


def test_all_excluded_never_divides_by_zero():
    assert Share.of(np.ones(2, bool), 0) == Share(included=False, factor=1.0)
