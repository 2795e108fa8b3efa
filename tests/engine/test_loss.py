import numpy as np
import pytest
import torch

from deepspeed_sentinel.engine.loss import mean_without

LOSSES = [[1.0, 2.0], [float("nan"), 5.0], [6.0, 9.0]]


def mean(out, losses=LOSSES):
    """As DeepSpeed's, over three columns in one process: each adds a third of its own mean."""
    own = [[torch.tensor(loss) for loss in of_column] for of_column in losses]
    means = [
        mean_without(np.array(out), column, of_column, lambda taken: sum(taken) / len(taken) / len(losses))
        for column, of_column in enumerate(own)
    ]
    assert torch.equal(torch.tensor(losses).nan_to_num(), torch.tensor(own).nan_to_num()), (
        "they are not changed in place"
    )
    return float(sum(means))


def test_an_evaluation_without_a_column_is_the_mean_of_the_others():
    assert mean([False, True, False]) == pytest.approx((1.5 + 7.5) / 2)
    assert mean([True, True, False]) == pytest.approx(7.5)


def test_an_evaluation_without_any_column_is_no_number():
    assert np.isnan(mean([True, True, True]))
