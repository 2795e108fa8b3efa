import pytest
import torch

from deepspeed_sentinel.kernels.sliced_quantiles import (
    DIRECTIONS,
    QUANTILES,
    ROWS,
    project_rows,
    quantiles,
    unit_directions,
)


@pytest.mark.parametrize("tokens", [1, 7, ROWS, 1000])
def test_quantiles_are_those_of_the_projected_tokens(tokens):
    x_TD = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(3))
    directions = unit_directions(12, seed=0, device=torch.device("cpu"))
    projected = torch.empty(ROWS, DIRECTIONS)
    project_rows(x_TD, directions, projected)
    result = quantiles(projected[None]).view(DIRECTIONS, QUANTILES)
    assert (result.diff(dim=1) >= 0).all()
    everything = x_TD @ directions
    assert (result <= everything.max(0).values[:, None] + 1e-5).all()
    assert (result >= everything.min(0).values[:, None] - 1e-5).all()


def test_directions_are_unit_and_repeatable():
    first, second = (unit_directions(33, seed=5, device=torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(DIRECTIONS))


def test_non_finite_tokens_do_not_spread():
    x_TD = torch.full((ROWS, 4), float("nan"))
    out = torch.empty(ROWS, DIRECTIONS)
    project_rows(x_TD, unit_directions(4, 0, torch.device("cpu")), out)
    assert (out == 0).all()
