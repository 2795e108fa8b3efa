import math

import pytest
import torch

from deepspeed_sentinel.kernels.dispatch import INTERPRETED
from deepspeed_sentinel.kernels.sliced_wasserstein import (
    DIRECTIONS,
    QUANTILES,
    sliced_wasserstein,
    sliced_wasserstein_reference,
)
from deepspeed_sentinel.kernels.token_sketch import projection, token_sketch_reference


@pytest.mark.parametrize("tokens", [1, 33] if INTERPRETED else [1, 2, 5, 31, 32, 33, 128, 250, 256])
def test_bits_of_the_reference(device, coarse_programs, tokens):
    sketch = torch.randn(2, tokens + 1, 64, generator=torch.Generator().manual_seed(tokens))[:, :tokens]
    sketch[0, 0, 3], sketch[1, -1, 2] = torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max
    result = sliced_wasserstein(sketch.to(device), 777).cpu()
    assert torch.equal(result, sliced_wasserstein_reference(sketch, 777))


def test_quantiles_are_those_of_the_tokens_along_unit_directions(coarse_programs):
    x_TD = torch.randn(60, 96, generator=torch.Generator().manual_seed(3))
    sketch, _ = token_sketch_reference(x_TD, torch.tensor([[5, 6]]))
    result = sliced_wasserstein(sketch, 96).view(DIRECTIONS, QUANTILES)
    directions = projection(96, torch.tensor(6))[:, :DIRECTIONS]
    directions = directions / directions.norm(dim=0)
    along = (x_TD @ directions).sort(dim=0).values
    for q in range(QUANTILES):
        torch.testing.assert_close(result[:, q], along[math.floor((q + 0.5) / QUANTILES * 60)], atol=1e-5, rtol=1e-5)


def test_leading_dimensions(coarse_programs):
    sketch = torch.randn(2, 3, 40, 64, generator=torch.Generator().manual_seed(1))
    together = sliced_wasserstein_reference(sketch, 50)
    assert torch.equal(together[1, 2], sliced_wasserstein(sketch[1, 2:3], 50)[0])


def test_wrong_arguments_are_refused(device):
    with pytest.raises(ValueError, match=r"\[M, 1 to 256 tokens, 64\], got \[2, 300, 64\]"):
        sliced_wasserstein(torch.empty(2, 300, 64, device=device), 5)
    with pytest.raises(ValueError, match=r"must be float32, got torch\.float64"):
        sliced_wasserstein(torch.empty(2, 3, 64, device=device).double(), 5)
