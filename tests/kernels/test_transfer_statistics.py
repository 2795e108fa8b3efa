import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sentinel.kernels.dispatch import INTERPRETED
from deepspeed_sentinel.kernels.token_sketch import projection
from deepspeed_sentinel.kernels.transfer_statistics import (
    TRANSFER,
    huber_weights,
    transfer_statistics,
    transfer_statistics_reference,
)

U = 2.0**-24
K = 64


def pair(messages, tokens, seed, change=0.3, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    entering = torch.randn(messages, tokens, K, generator=generator) * scale
    w = torch.randn(K, K, generator=generator) / K**0.5
    leaving = entering + change * (entering @ w + scale * torch.randn(messages, tokens, K, generator=generator))
    norms = [sketch.double().norm(dim=-1).float() * 1.01 for sketch in (entering, leaving)]
    return entering, leaving, *norms, w


def compute(device, *arguments):
    return [out.cpu() for out in transfer_statistics(*(argument.to(device) for argument in arguments))]


@settings(max_examples=6 if INTERPRETED else 40, deadline=None)
@given(
    messages=st.integers(1, 2),
    tokens=st.integers(2, 40),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-18, 18),
)
def test_values_against_float64(device, messages, tokens, seed, exponent):
    arguments = pair(messages, tokens, seed, scale=10.0**exponent)
    scalars, cross, a, b = compute(device, *arguments)
    entering, leaving, entering_norms, leaving_norms, w = (argument.double() for argument in arguments)
    huber = huber_weights(entering_norms, leaving_norms)[..., None]
    entering, leaving = entering * huber, leaving * huber
    exact = transfer_statistics_reference(*(argument.double() for argument in arguments))
    # Each statistic is a sum of products over its norms. By Cauchy-Schwarz the sum of the products' magnitudes is at
    # most the product of the norms, so an error of n u of it (n: additions and roundings in a row) is n u of the
    # statistic's unit, times how much larger the summands are than what they leave after centring (kappa), and than
    # what the map leaves of them (lambda).
    n = tokens + K + 32
    centred = [x - x.mean(1, keepdim=True) for x in (entering, leaving, leaving - entering)]
    sizes = [x.norm(dim=(1, 2)) for x in centred]
    kappa = (entering.norm(dim=(1, 2)) + leaving.norm(dim=(1, 2))) / torch.stack(sizes).min(0).values
    lam = sizes[0] * w.norm() / (centred[0] @ w).norm(dim=(1, 2))
    bounds = torch.stack([torch.ones(messages), 100 + 0 * kappa, kappa, 4 * K * kappa, kappa * lam**2, kappa * lam**2])
    error = (scalars - exact.scalars_M6).abs()
    assert (error <= n * U * bounds.T * exact.scalars_M6.abs().clamp_min(1.0)).all(), (error, bounds)
    assert ((cross - exact.cross_MK).abs() <= n * U).all()
    for got, wanted in ((a, exact.a_MKK), (b, exact.b_MKK)):
        size = entering.norm(dim=(1, 2)) * (entering.norm(dim=(1, 2)) + leaving.norm(dim=(1, 2))) / tokens
        assert ((got - wanted).abs() <= n * U * size[:, None, None]).all()


def test_meaning(device):
    entering, leaving, entering_norms, leaving_norms, w = pair(1, 200, seed=1)
    scalars, cross, a, b = compute(device, entering, leaving, entering_norms, leaving_norms, w)
    named = dict(zip(TRANSFER, scalars[0].tolist(), strict=True))
    assert 0.9 < named["cosine"] < 1 and 0 < named["gain"] < 0.3 and 0.3 < named["step"] < 0.5
    assert 0.6 < named["correlation"] < 0.8 and 0.25 < named["slope"] < 0.35 and cross.min() > 0.5
    learnt = torch.linalg.solve(a[0] + 1e-6 * torch.eye(K), b[0])
    assert torch.nn.functional.cosine_similarity(learnt.flatten(), w.flatten(), dim=0) > 0.8
    negated = compute(device, entering, -leaving, entering_norms, leaving_norms, w)[0][0]
    assert negated[0] == -scalars[0, 0] and negated[4] < 0
    passed = compute(device, entering, entering, entering_norms, entering_norms, w)[0][0]
    assert passed[1] == 0 and passed[2] == 0 and passed[4] == 0 and passed[5] == 0


@pytest.mark.parametrize("change", [0.01, 0.1, 1.0])
def test_cosine_is_known_equally_well_however_little_a_stage_changes(device, change):
    # Tokens that share a direction share the projection's error too, so averaging over them does not remove it.
    generator = torch.Generator().manual_seed(8)
    entering = 2.0 * torch.randn(300, generator=generator) + torch.randn(16, 300, generator=generator)
    leaving = entering + change * torch.randn(16, 300, generator=generator)
    exact = torch.nn.functional.cosine_similarity(entering, leaving, dim=-1).mean().double()
    projections = projection(300, torch.arange(24))
    norms = [torch.linalg.vector_norm(x, dim=-1).expand(24, 16) for x in (entering, leaving)]
    scalars, *_ = compute(device, entering @ projections, leaving @ projections, *norms, torch.zeros(K, K))
    cosines = scalars[:, 0].double()
    assert (cosines.abs() <= 1).all(), cosines
    # Fisher: the inverse hyperbolic tangent of a correlation of K samples is off by 1 / sqrt(K - 3).
    error = (cosines.atanh() - exact.atanh()).square().mean().sqrt()
    assert error <= 1.5 / (K - 3) ** 0.5, error


def test_a_massive_token_does_not_drown_the_others(device):
    entering, leaving, entering_norms, leaving_norms, w = pair(1, 200, seed=6)
    usual = compute(device, entering, leaving, entering_norms, leaving_norms, w)[0][0]
    massive = entering.clone(), leaving.clone(), entering_norms.clone(), leaving_norms.clone()
    for values in massive:
        values[:, 7] *= 1000.0
    found, cross, a, _ = compute(device, *massive, w)
    assert ((found - usual).abs() <= 0.02).all(), (found, usual)
    assert a.diagonal(dim1=1, dim2=2).mean() < 1.2 and cross.min() > 0.5
    grown = compute(device, entering, massive[1], entering_norms, massive[3], w)[0][0]
    assert ((grown - usual).abs()[[2, 3, 4, 5]] <= 0.05).all(), (grown, usual)


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_degenerate_messages_give_the_stated_values(device, tokens):
    zero, one = torch.zeros(1, tokens, K), torch.ones(1, tokens, K)
    none, some, w = torch.zeros(1, tokens), torch.full((1, tokens), 8.0), torch.eye(K)
    for entering, leaving, entering_norms, leaving_norms in (
        (zero, zero, none, none),
        (zero, one, none, some),
        (one, zero, some, none),
        (one, one, some, some),
    ):
        scalars, *rest = compute(device, entering, leaving, entering_norms, leaving_norms, w)
        assert torch.isfinite(scalars[0, :4]).all() and scalars[0, 4:].isnan().all()
        assert scalars[0, 3] == 0 and all(torch.isfinite(out).all() for out in rest)
        assert scalars[0, 0] == (1 if entering is one and leaving is one else 0)


def test_no_map_yet_means_not_available(device):
    entering, leaving, entering_norms, leaving_norms, w = pair(2, 20, seed=2)
    scalars, *_ = compute(device, entering, leaving, entering_norms, leaving_norms, torch.zeros_like(w))
    assert scalars[:, 4:].isnan().all() and torch.isfinite(scalars[:, :4]).all()


@pytest.mark.parametrize(("e_scale", "l_scale"), [(3e37, 1e-44), (1e-44, 3e37), (3e37, 3e37), (1e-44, 1e-44)])
def test_extreme_sizes_stay_finite(device, e_scale, l_scale):
    generator = torch.Generator().manual_seed(7)
    signs = torch.randn(2, 1, 9, K, generator=generator).sign()
    entering, leaving = signs[0] * e_scale, signs[1] * l_scale
    norms = [torch.full((1, 9), min(scale * 8, 3e38)) for scale in (e_scale, l_scale)]
    for out in compute(device, entering, leaving, *norms, torch.eye(K)):
        assert torch.isfinite(out).all()
    foreign = compute(device, entering, leaving, torch.zeros(1, 9), torch.zeros(1, 9), torch.eye(K))[0]
    assert torch.isfinite(foreign).all()


def test_strides_and_leading_dimensions(device):
    arguments = pair(2, 20, seed=3)
    plain = compute(device, *arguments)
    buffers = [torch.full((3, 30, *a.shape[2:]), 5.0) for a in arguments[:4]]
    for buffer, a in zip(buffers, arguments[:4], strict=True):
        buffer[1:, :20] = a
    strided = transfer_statistics(
        *(buffer.to(device)[1:, :20] for buffer in buffers), arguments[4].to(device).T.contiguous().T
    )
    for one, other in zip(plain, strided, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-5, atol=1e-5)
    many = transfer_statistics_reference(*(a[None] for a in arguments[:4]), arguments[4])
    for one, other in zip(plain, many, strict=True):
        torch.testing.assert_close(one, other[0], rtol=1e-4, atol=1e-5)


def test_each_message_may_have_a_map_of_its_own(device):
    first, second = pair(1, 20, seed=3), pair(1, 20, seed=4)
    apart = [compute(device, *arguments) for arguments in (first, second)]
    maps = torch.stack([first[4], second[4]])
    together = compute(device, *(torch.cat(both) for both in zip(first[:4], second[:4], strict=True)), maps)
    for one, other, both in zip(*apart, together, strict=True):
        torch.testing.assert_close(torch.cat([one, other]), both, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_refused(device):
    entering, leaving, entering_norms, leaving_norms, w = (a.to(device) for a in pair(1, 5, seed=4))
    with pytest.raises(ValueError, match=r"leaving_MmK must be float32 \[1, 5, 64\].*, got float32 \[1, 4, 64\]"):
        transfer_statistics(entering, leaving[:, :4], entering_norms, leaving_norms, w)
    with pytest.raises(ValueError, match=r"entering_MmK must be \[M, 1 to 256 tokens, 64\], got \[5, 64\]"):
        transfer_statistics(entering[0], leaving, entering_norms, leaving_norms, w)
