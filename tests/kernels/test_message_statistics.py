import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sentinel.kernels.message_statistics import message_statistics, tensor_digest

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compute(x_TD):
    sums, scalars = torch.empty(x_TD.shape[1]), torch.empty(3)
    digest = torch.empty(2, dtype=torch.int32)
    message_statistics(x_TD, sums, scalars, digest)
    return sums, scalars, digest


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 70),
    hidden=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-6, 3),
)
def test_values_against_float64(tokens, hidden, dtype, seed, exponent):
    x_TD = (torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent).to(dtype)
    sums, scalars, _ = compute(x_TD)
    exact = x_TD.double()
    # Recursive summation of n float32 terms is off by at most n * 2^-24 of the sum of their magnitudes (Higham 2002).
    bound = tokens * 2.0**-24 * exact.abs().sum(0)
    assert ((sums.double() - exact.sum(0)).abs() <= bound).all()
    energy = exact.pow(2).sum().item()
    assert abs(scalars[0].item() - energy) <= (x_TD.numel() + 1) * 2.0**-24 * energy + 1e-44
    assert scalars[1].item() == exact.abs().max().item()
    assert scalars[2].item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_elements_are_counted_and_left_out(dtype):
    x_TD = torch.ones(6, 5, dtype=dtype)
    x_TD[1, 2], x_TD[3, 4], x_TD[5, 0] = math.nan, math.inf, -math.inf
    sums, scalars, _ = compute(x_TD)
    assert scalars[2] == 3
    assert sums.tolist() == [5, 6, 5, 6, 5]
    assert scalars[0] == 27 and scalars[1] == 1


def test_digest_sees_every_single_bit():
    x_TD = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    before = tensor_digest(x_TD)
    for element in range(x_TD.numel()):
        for bit in range(32):
            flipped = x_TD.clone()
            flipped.view(-1).view(torch.int32)[element] ^= (1 << bit) if bit < 31 else -(1 << 31)
            assert not torch.equal(tensor_digest(flipped), before), (element, bit)


def test_digest_sees_swapped_tokens_columns_and_signed_zero():
    x_TD = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    digest = tensor_digest(x_TD)
    assert not torch.equal(tensor_digest(x_TD[[1, 0, *range(2, 12)]]), digest)
    assert not torch.equal(tensor_digest(x_TD[:, [1, 0, *range(2, 8)]]), digest)
    assert not torch.equal(tensor_digest(torch.zeros(3)), tensor_digest(-torch.zeros(3)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64])
def test_digest_takes_any_dtype_shape_and_stride(dtype):
    x = (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype)
    assert torch.equal(tensor_digest(x), tensor_digest(x.clone()))
    assert torch.equal(tensor_digest(x.transpose(0, 2)), tensor_digest(x.transpose(0, 2).contiguous()))
    changed = x.clone()
    changed[1, 2, 3] = 0
    assert not torch.equal(tensor_digest(changed), tensor_digest(x))
    assert tensor_digest(torch.tensor(3).to(dtype)).shape == (2,)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"floating-point \[T, D\]"):
        message_statistics(torch.ones(3), torch.empty(3), torch.empty(3), torch.empty(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"column_sums_D must be float32 \[4\]"):
        message_statistics(torch.ones(3, 4), torch.empty(3), torch.empty(3), torch.empty(2, dtype=torch.int32))
