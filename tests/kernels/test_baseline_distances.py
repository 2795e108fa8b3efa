import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sentinel.kernels import baseline_distances as baseline_module
from deepspeed_sentinel.kernels.baseline_distances import (
    baseline_distances,
    baseline_distances_reference,
    baseline_update,
    baseline_update_reference,
)
from deepspeed_sentinel.kernels.dispatch import INTERPRETED

U = 2.0**-24


def test_definition_by_hand(device):
    means = torch.tensor([[1.0, -2.0], [3.0, 4.0]], device=device)
    quantiles = torch.tensor([[0.0, 1.0], [2.0, 5.0]], device=device)
    average = torch.tensor([3.0, 4.0, 0.0, 1.0], device=device) / 2
    result = baseline_distances(means, quantiles, average, 0.5).cpu()
    np.testing.assert_allclose(result[0], [4.0, np.sqrt(4 + 36) / 5, 0.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(result[1], [0.0, 0.0, 0.0, 3.0], rtol=1e-6)


@settings(max_examples=8 if INTERPRETED else 40, deadline=None)
@given(
    messages=st.integers(1, 3),
    hidden=st.integers(1, 1100),
    quantiles=st.integers(1, 600),
    seed=st.integers(0, 2**16),
    correction=st.floats(0.01, 1.0),
)
def test_values_against_float64(device, messages, hidden, quantiles, seed, correction):
    generator = torch.Generator().manual_seed(seed)
    means, sketches = (torch.randn(messages, size, generator=generator) for size in (hidden, quantiles))
    average = torch.randn(hidden + quantiles, generator=generator)
    result = baseline_distances(means.to(device), sketches.to(device), average.to(device), correction).cpu()
    exact = baseline_distances_reference(means.double(), sketches.double(), average.double(), correction)
    corrected = average.double() / correction
    # A difference is off by its own rounding and that of the quotient, 2u of the two magnitudes; sums add n u of
    # themselves. A sum of squares has half the relative error of its root.
    means_size = means.double().abs() + corrected[:hidden].abs()
    rounding = (
        2
        * U
        * torch.stack(
            [
                means_size.mean(1),
                means_size.norm(dim=1) / corrected[:hidden].norm(),
                torch.zeros(messages),
                (sketches.double().abs() + corrected[hidden:].abs()).mean(1),
            ],
            dim=1,
        )
    )
    assert ((result - exact).abs() <= rounding + (max(hidden, quantiles) + 8) * U * exact).all()


def test_zero_baseline_gives_finite_numbers(device):
    result = baseline_distances(
        torch.ones(1, 3, device=device), torch.ones(1, 2, device=device), torch.zeros(5, device=device), 1.0
    )
    assert torch.isfinite(result[:, [0, 2, 3]]).all()


@pytest.mark.parametrize("replicas", [2, 3] if INTERPRETED else [1, 2, 3, 8, 13])
def test_update_takes_the_median_of_the_clean(device, replicas):
    generator = torch.Generator().manual_seed(replicas)
    summaries = torch.randn(replicas, 300, generator=generator)
    average = torch.randn(300, generator=generator)
    for clean_count in {0, 1, replicas // 2, replicas}:
        clean = torch.zeros(replicas, dtype=torch.bool)
        clean[torch.randperm(replicas, generator=generator)[:clean_count]] = True
        given_summaries = summaries.clone()
        given_summaries[~clean] = float("nan")
        updated = average.clone().to(device)
        baseline_update(updated, given_summaries.to(device), clean.to(device), 0.9)
        expected = average
        if clean_count:
            median = torch.quantile(summaries[clean].double(), 0.5, dim=0)
            expected = (0.9 * average.double() + 0.1 * median).float()
        torch.testing.assert_close(updated.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("replicas", range(2, 9))
def test_what_is_not_finite_changes_nothing_whoever_sends_it(device, replicas, monkeypatch):
    monkeypatch.setattr(baseline_module, "_UPDATED", 64)  # programs as small as the case: the interpreter sorts slowly
    generator = torch.Generator().manual_seed(replicas)
    summaries, average = torch.randn(replicas, 7, generator=generator), torch.randn(7, generator=generator)
    clean = torch.ones(replicas, dtype=torch.bool)
    lies = torch.tensor([0.0, torch.nan, torch.inf, -torch.inf, 1e30, torch.nan, -1e30])
    for liar in range(replicas):
        told, honest = summaries.clone(), summaries[torch.arange(replicas) != liar]
        told[liar] += lies
        told[:, 5] = torch.nan  # nobody has a number here
        updated = average.clone().to(device)
        baseline_update(updated, told.to(device), clean.to(device), 0.9)
        updated = updated.cpu()
        for lied in (1, 2, 3):
            expected = 0.9 * average[lied] + 0.1 * honest[:, lied].quantile(0.5)
            torch.testing.assert_close(updated[lied], expected, msg=f"liar {liar} of {replicas}, {lies[lied]}")
        torch.testing.assert_close(updated[0], 0.9 * average[0] + 0.1 * summaries[:, 0].quantile(0.5))
        assert updated[5] == average[5]
        if replicas > 2:
            added = 10 * (updated - 0.9 * average)[[4, 6]]
            low, high = honest[:, [4, 6]].aminmax(dim=0)
            assert ((added >= low - 1e-4) & (added <= high + 1e-4)).all()


def test_update_of_many_baselines():
    generator = torch.Generator().manual_seed(0)
    averages, summaries = torch.randn(2, 3, 9, generator=generator), torch.randn(2, 3, 4, 9, generator=generator)
    clean = torch.rand(2, 3, 4, generator=generator) > 0.4
    clean[0, 0] = False
    together = baseline_update_reference(averages, summaries, clean, 0.8)
    for a in range(2):
        for b in range(3):
            one = averages[a, b].clone()
            baseline_update(one, summaries[a, b], clean[a, b], 0.8)
            torch.testing.assert_close(together[a, b], one)
    distances = baseline_distances_reference(summaries[..., :6], summaries[..., 6:], averages, 0.7)
    one = baseline_distances(summaries[1, 2, :, :6], summaries[1, 2, :, 6:], averages[1, 2], 0.7)
    torch.testing.assert_close(distances[1, 2], one)


def test_wrong_arguments_are_refused(device):
    def empty(*shape):
        return torch.empty(shape, device=device)

    with pytest.raises(ValueError, match=r"average_V must be float32 \[5\].*, got float32 \[4\]"):
        baseline_distances(empty(2, 3), empty(2, 2), empty(4), 1.0)
    with pytest.raises(ValueError, match=r"clean_R must be bool \[2\]"):
        baseline_update(empty(5), empty(2, 5), empty(2), 0.9)
