import numpy as np
import torch

from deepspeed_sentinel.kernels.baseline_distances import baseline_distances


def test_definition_by_hand():
    means = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    quantiles = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    result = baseline_distances(means, quantiles, torch.tensor([3.0, 4.0, 0.0, 1.0]), 1.0)
    np.testing.assert_allclose(result[0], [4.0, np.sqrt(4 + 36) / 5, 0.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(result[1], [0.0, 0.0, 0.0, 3.0], rtol=1e-6)


def test_zero_baseline_gives_finite_numbers():
    result = baseline_distances(torch.ones(1, 3), torch.ones(1, 2), torch.zeros(5), 1.0)
    assert torch.isfinite(result[:, [0, 2, 3]]).all()
