import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sentinel.kernels.dispatch import INTERPRETED
from deepspeed_sentinel.kernels.token_sketch import (
    DIMENSIONS,
    projection,
    sampled_rows,
    sketch_rows,
    token_sketch,
    token_sketch_reference,
)

U = 2.0**-24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = torch.tensor([[0, 1], [-(2**63), 2**62 + 12345]])


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compute(x_TD, seeds_J2=SEEDS):
    jobs, rows = len(seeds_J2), sketch_rows(x_TD.shape[0])
    sketch = torch.full((jobs, 3, rows + 2, DIMENSIONS), 7.0, device=x_TD.device)
    norms = torch.full((jobs, 3, rows + 2), 7.0, device=x_TD.device)
    token_sketch(x_TD, seeds_J2.to(x_TD.device), sketch[:, 1, :rows], norms[:, 1, :rows])
    assert (sketch[:, ::2] == 7).all() and (sketch[:, :, rows:] == 7).all() and (norms[:, 1, rows:] == 7).all()
    return sketch[:, 1, :rows].cpu(), norms[:, 1, :rows].cpu()


def check(x_TD, seeds_J2=SEEDS):
    """Against float64: D additions of exact products, in any order, and the square root of such a sum."""
    sketch, norms = compute(x_TD, seeds_J2)
    hidden = x_TD.shape[1]
    for job, (sample, project) in enumerate(seeds_J2):
        rows = x_TD.cpu().double().nan_to_num(0, 0, 0)[sampled_rows(x_TD.shape[0], sample)]
        magnitude = rows.abs().sum(1, keepdim=True) / 8
        error = (sketch[job] - rows @ projection(hidden, project).double()).abs()
        assert (error <= (hidden + 64) * U * magnitude + hidden * 2.0**-149).all()
        exact = torch.linalg.vector_norm(rows, dim=1)
        assert ((norms[job] - exact).abs() <= (hidden + 8) * U * exact + 2.0**-149).all()


@settings(max_examples=4 if INTERPRETED else 40, deadline=None)
@given(
    tokens=st.integers(1, 20),
    hidden=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
    sample=st.integers(-(2**63), 2**63 - 1),
)
def test_values_against_float64(device, tokens, hidden, dtype, seed, sample):
    check(random(tokens, hidden, seed=seed, dtype=dtype).to(device), torch.tensor([[sample, seed]]))


@pytest.mark.parametrize(("tokens", "hidden", "dtype"), [(300, 70, torch.float32), (1000, 64, torch.bfloat16)])
def test_more_tokens_than_sampled(device, coarse_programs, tokens, hidden, dtype):
    check(random(tokens, hidden, seed=1, dtype=dtype).to(device))


def test_wide_messages_and_strides(device):
    wide = random(6, 2200, seed=2).to(device)
    for x_TD in (wide, wide[:, 7:1500], wide.T[5:11], wide[::2, ::3]):
        check(x_TD)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_elements_count_as_zero_and_the_rest_is_finite(device, dtype):
    x_TD = random(5, 66, seed=3, dtype=dtype)
    x_TD[0, 2], x_TD[1, 65], x_TD[2] = math.nan, math.inf, -math.inf
    check(x_TD.to(device))
    x_TD[3] = torch.finfo(dtype).max
    sketch, norms = compute(x_TD.to(device))
    assert torch.isfinite(sketch).all() and torch.isfinite(norms).all()
    assert (sketch[:, 2] == 0).all() and (norms[:, 2] == 0).all()


def test_norms_neither_overflow_nor_vanish(device):
    scales = torch.tensor([1e-44, 1e-38, 1e-25, 1e-13, 1.0, 1e17, 1e22, 1e36])
    x_TD = (random(8, 40, seed=4).sign() * scales[:, None]).to(device)
    _, norms = compute(x_TD)
    expected = torch.linalg.vector_norm(x_TD.cpu().double(), dim=1).float()
    torch.testing.assert_close(norms, expected.expand(2, -1), rtol=1e-5, atol=2e-45)


def test_every_token_once_when_all_are_sampled_and_each_stratum_once_else():
    seeds = torch.arange(50) * 7919
    assert torch.equal(sampled_rows(256, seeds), torch.arange(256).expand(50, 256))
    for tokens in (257, 4096, 5000, 2**31 + 11):
        rows = sampled_rows(tokens, seeds)
        i = torch.arange(256)
        assert (rows * 256 // tokens - i).abs().max() <= 1  # within its part, up to rounding at the border
        assert (rows[:, 1:] >= rows[:, :-1]).all() and rows.min() >= 0 and rows.max() < tokens
        if tokens % 256 == 0:  # else a token on the border of two parts may be drawn for both
            assert (rows[:, 1:] > rows[:, :-1]).all()
    counts = torch.bincount(sampled_rows(1024, torch.arange(4000)).flatten(), minlength=1024)
    # Each token has a chance of 1/4 a seed: five standard deviations of a binomial count.
    assert (counts - 1000).abs().max() <= 5 * math.sqrt(4000 * 0.25 * 0.75)


def test_seeds_give_unrelated_projections_with_exact_entries():
    seeds = torch.tensor([0, 1, 2, 3, 2**32, -1])
    r = projection(640, seeds)
    assert (r.abs() == 0.125).all()
    flat = r.flatten(1) * 8
    correlation = (flat @ flat.T) / flat.shape[1] - torch.eye(6)
    # Of two random sign matrices of this structure the entries are pairwise independent: five deviations of a mean
    # of 640 independent blocks' worth of signs.
    assert correlation.abs().max() <= 5 / math.sqrt(640)


def test_inner_products_are_unbiased_with_the_variance_of_independent_signs_or_less():
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, 200, generator=generator)
    x[3], x[4] = 30.0, -25.0  # outlier dimensions, as language models have them
    r = projection(200, torch.arange(3000))
    estimates = ((x @ r) * (y @ r)).sum(-1)
    variance = (x.norm() ** 2 * y.norm() ** 2 + (x @ y) ** 2 - 2 * (x**2 * y**2).sum()) / DIMENSIONS
    assert abs(estimates.mean() - x @ y) <= 5 * (variance / 3000).sqrt()
    assert estimates.var() <= 1.2 * variance


def test_many_messages_with_common_and_with_own_seeds():
    x_NTD = random(3, 300, 20, seed=6)
    own = torch.stack([SEEDS + 3 * index for index in range(3)])
    common_sketch, common_norms = token_sketch_reference(x_NTD, SEEDS)
    own_sketch, own_norms = token_sketch_reference(x_NTD, own)
    for index in range(3):
        for seeds, sketch, norms in ((SEEDS, common_sketch, common_norms), (own[index], own_sketch, own_norms)):
            one = token_sketch_reference(x_NTD[index], seeds)
            torch.testing.assert_close(sketch[index], one[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(norms[index], one[1], rtol=1e-6, atol=0)


def test_wrong_arguments_are_refused(device):
    x_TD, seeds = torch.ones(5, 3, device=device), SEEDS.to(device)
    sketch, norms = torch.empty(2, 5, 64, device=device), torch.empty(2, 5, device=device)
    with pytest.raises(ValueError, match=r"floating-point \[T >= 1, D\] tensor, got torch.float32 \[0, 3\]"):
        token_sketch(x_TD[:0], seeds, sketch, norms)
    with pytest.raises(ValueError, match=r"seeds_J2 must be int64 \[2, 2\]"):
        token_sketch(x_TD, seeds.int(), sketch, norms)
    with pytest.raises(ValueError, match=r"sketch_JmK must be float32 \[2, 5, 64\].*, got float32 \[2, 4, 64\]"):
        token_sketch(x_TD, seeds, sketch[:, :4], norms)
