import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sentinel.kernels.dispatch import INTERPRETED, integer_view, runs_on_triton
from deepspeed_sentinel.kernels.message_statistics import message_statistics, message_statistics_reference
from deepspeed_sentinel.kernels.message_stream import plan_stream
from deepspeed_sentinel.kernels.tensor_digest import tensor_digest

U = 2.0**-24  # float32's unit roundoff
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(tokens, hidden, seed, dtype=torch.float32, scale=1.0):
    return (torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def compute(x_TD, copy_TD=None):
    sums, scalars = torch.full((x_TD.shape[1],), 7.0, device=x_TD.device), torch.full((3,), 7.0, device=x_TD.device)
    digest = torch.full((2,), 7, dtype=torch.int32, device=x_TD.device)
    message_statistics(x_TD, sums, scalars, digest, copy_TD)
    return sums.cpu(), scalars.cpu(), digest.cpu()


def depths(x_TD):
    """How many roundings a term of a column sum, and of the energy, can go through.

    In any order n terms make at most n - 1 additions. The kernel's order is known: 8 tokens, then the groups of 8 of
    a program, then 16 lanes of groups and a tree over these; for the energy a tree over a program's columns and one
    over lanes of programs besides.
    """
    tokens, hidden = x_TD.shape
    if not runs_on_triton(x_TD):
        return tokens, tokens * hidden + 1
    plan = plan_stream(x_TD)
    in_program = 8 + plan.rows // 8
    return in_program + plan.groups // 16 + 1 + 4, 1 + in_program + 10 + plan.programs // 1024 + 1 + 10


@settings(max_examples=6 if INTERPRETED else 40, deadline=None)
@given(
    tokens=st.integers(1, 70),
    hidden=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-6, 3),
)
def test_values_against_float64(device, tokens, hidden, dtype, seed, exponent):
    x_TD = random(tokens, hidden, seed, dtype, 10.0**exponent).to(device)
    sums, scalars, digest = compute(x_TD)
    exact = x_TD.cpu().double()
    column_depth, energy_depth = depths(x_TD)
    # A sum of rounded additions is off by at most depth * u of the sum of magnitudes (Higham 2002, section 4.2).
    assert ((sums - exact.sum(0)).abs() <= column_depth * U * exact.abs().sum(0)).all()
    energy = exact.pow(2).sum().item()
    assert abs(scalars[0].item() - energy) <= energy_depth * U * energy + x_TD.numel() * 2.0**-149
    assert scalars[1].item() == exact.abs().max().item()
    assert scalars[2].item() == 0
    assert torch.equal(digest, tensor_digest(x_TD.cpu()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (1, 9), (9, 1), (64, 1024), (37, 1030)])
def test_edges_against_the_reference(device, dtype, shape):
    x_TD = random(*shape, seed=4, dtype=dtype).to(device)
    copy_TD = torch.full_like(x_TD, 3.0)
    result = compute(x_TD, copy_TD)
    reference = message_statistics_reference(x_TD.cpu())
    assert torch.equal(integer_view(copy_TD), integer_view(x_TD))
    assert torch.equal(result[2], reference[2])
    assert torch.equal(result[1][1:], reference[1][1:])
    assert not torch.signbit(result[1]).any()
    torch.testing.assert_close(result[0], reference[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result[1], reference[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_elements_are_counted_and_left_out(device, dtype):
    x_TD = torch.ones(6, 5, dtype=dtype)
    x_TD[1, 2], x_TD[3, 4], x_TD[5, 0] = math.nan, math.inf, -math.inf
    sums, scalars, digest = compute(x_TD.to(device))
    assert scalars[2] == 3
    assert sums.tolist() == [5, 6, 5, 6, 5]
    assert scalars[0] == 27 and scalars[1] == 1
    assert torch.equal(digest, tensor_digest(x_TD))


def test_all_elements_non_finite(device):
    sums, scalars, _ = compute(torch.full((33, 3), math.nan, device=device))
    assert sums.tolist() == [0, 0, 0] and scalars.tolist() == [0, 0, 99]


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_overflow_nothing_is_taken_for_non_finite(device, dtype):
    largest = torch.finfo(dtype).max
    x_TD = torch.full((3, 4), largest, dtype=dtype)
    sums, scalars, _ = compute(x_TD.to(device))
    assert scalars[1] == largest and scalars[2] == 0
    if dtype == torch.float16:
        assert sums.tolist() == [3 * largest] * 4
    else:
        assert torch.isposinf(sums).all() and torch.isposinf(scalars[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_count(device, dtype):
    smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-133
    sums, scalars, _ = compute(torch.full((5, 2), smallest, dtype=dtype, device=device))
    assert sums.tolist() == [5 * smallest] * 2 and scalars[1] == smallest and scalars[2] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(device, dtype):
    wide = random(40, 90, seed=2, dtype=dtype).to(device)
    for x_TD in (wide[:, 5:70], wide[::3], wide.T, wide[:, ::2], wide.flip(0)[3:4].expand(7, 90)):
        for result, reference in zip(compute(x_TD), compute(x_TD.contiguous()), strict=True):
            torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)


def test_the_same_bits_from_run_to_run_and_for_a_copy_elsewhere(device):
    x_TD = random(100, 130, seed=5).to(device)
    moved = torch.empty(101, 133, device=device)[1:, 3:].copy_(x_TD)
    for again in (compute(x_TD), compute(x_TD.clone())):
        assert all(torch.equal(a, b) for a, b in zip(again, compute(x_TD), strict=True))
    assert torch.equal(compute(moved)[2], compute(x_TD)[2])


def test_a_large_offset_does_not_wrap(device):
    if device.type == "cpu":  # three gigabytes to prove an index on a CPU are too many
        x_TD = torch.zeros(1).as_strided((3, 2), (0, 0))
        assert compute(x_TD)[1][2] == 0
        return
    x_TD = torch.zeros(2**17 + 3, 2**14 + 8, dtype=torch.bfloat16, device=device)
    x_TD[-1, -1], x_TD[-2, 0] = 3.0, math.nan
    sums, scalars, _ = compute(x_TD)
    assert sums[-1] == 3 and scalars.tolist() == [9, 3, 1]


def test_many_messages_at_once():
    x_NTD = torch.stack([random(9, 7, seed=seed) for seed in range(3)])
    x_NTD[1, 2, 3] = math.inf
    together = message_statistics_reference(x_NTD[None])
    for index, x_TD in enumerate(x_NTD):
        for many, one in zip(together, message_statistics_reference(x_TD), strict=True):
            torch.testing.assert_close(many[0, index], one, rtol=1e-6, atol=1e-6)
    assert together[1][0, :, 2].tolist() == [0, 1, 0]


def test_reference_takes_no_decision_from_data_off_the_cpu():
    on_meta = message_statistics_reference(torch.empty(5, 3, device="meta"))
    assert [tuple(out.shape) for out in on_meta] == [(3,), (3,), (2,)]


def test_digest_sees_every_single_bit():
    x_TD = random(9, 7, seed=0)
    before = tensor_digest(x_TD)
    # The interpreter takes 40 ms a launch: there a third of the bits, of elements of all columns, is enough.
    for element in range(0, x_TD.numel(), 8 if INTERPRETED else 1):
        for bit in range(element % 3, 32, 3) if INTERPRETED else range(32):
            flipped = x_TD.clone()
            flipped.view(-1).view(torch.int32)[element] ^= (1 << bit) if bit < 31 else -(1 << 31)
            after = tensor_digest(flipped)
            assert (after != before).all(), (element, bit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_digest_sees_what_changes_the_highest_bits_of_many(device, dtype):
    """Weights alone would add the highest bits of an even number of elements to zero."""
    x_TD = random(24, 8, seed=2).to(device, dtype)
    digest = tensor_digest(x_TD)
    assert (tensor_digest(-x_TD) != digest).all()
    for rows in (slice(0, 1), slice(3, 11), slice(0, 24, 2)):
        flipped, larger = x_TD.clone(), x_TD.clone()
        flipped[rows] *= -1
        larger[rows] *= 4.0
        assert (tensor_digest(flipped) != digest).all() and (tensor_digest(larger) != digest).all()


def test_digest_sees_swapped_tokens_columns_and_signed_zero():
    x_TD = random(24, 8, seed=1)
    digest = tensor_digest(x_TD)
    for one, other in ((0, 1), (3, 11), (8, 16)):
        order = list(range(24))
        order[one], order[other] = other, one
        assert (tensor_digest(x_TD[order]) != digest).all()
    assert (tensor_digest(x_TD[:, [1, 0, *range(2, 8)]]) != digest).all()
    assert not torch.equal(tensor_digest(torch.zeros(3)), tensor_digest(-torch.zeros(3)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64])
def test_digest_takes_any_dtype_shape_and_stride(device, dtype):
    x = (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype).to(device)
    assert torch.equal(tensor_digest(x), tensor_digest(x.clone()))
    assert torch.equal(tensor_digest(x.transpose(0, 2)), tensor_digest(x.transpose(0, 2).contiguous()))
    assert torch.equal(tensor_digest(x).cpu(), tensor_digest(x.cpu()))
    changed = x.clone()
    changed[1, 2, 3] = 0
    assert not torch.equal(tensor_digest(changed), tensor_digest(x))
    assert tensor_digest(torch.tensor(3).to(dtype)).shape == (2,)
    one_channel = torch.ones(1, 1, 1, 2, dtype=dtype, device=device).movedim(1, -1).reshape(2, 1)
    assert torch.equal(tensor_digest(one_channel), tensor_digest(torch.ones(2, 1, dtype=dtype, device=device)))


def test_wrong_arguments_are_refused(device):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    digest = empty(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"floating-point \[T, D\] tensor, got torch.float32 \[3\]"):
        message_statistics(empty(3), empty(3), empty(3), digest)
    with pytest.raises(ValueError, match=r"column_sums_D must be float32 \[4\] on \w+(:0)?, got float32 \[3\]"):
        message_statistics(empty(3, 4), empty(3), empty(3), digest)
    with pytest.raises(ValueError, match=r"digest_2 must be int32 \[2\]"):
        message_statistics(empty(3, 4), empty(4), empty(3), digest.long())
    with pytest.raises(ValueError, match="scalars_3 must be contiguous"):
        message_statistics(empty(3, 4), empty(4), empty(6)[::2], digest)
    with pytest.raises(ValueError, match=r"copy_TD must be float32 \[3, 4\]"):
        message_statistics(empty(3, 4), empty(4), empty(3), digest, empty(3, 4).half())
