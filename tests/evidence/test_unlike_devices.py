import numpy as np
import pytest
import torch

from deepspeed_sentinel.evidence.table import FLOORS, NAMES, OF_PAIR, comparable
from deepspeed_sentinel.evidence.transfer import Known, Sketches, pair_rows
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS


@pytest.mark.parametrize("change", [1e-1, 1e-2, 3e-3, 1e-3])
def test_devices_that_add_in_another_order_differ_by_less_than_honest_messages(change):
    """Two neighbours report the same row, each computed on its own device: rounding alone must be no dispute."""
    generator = torch.Generator().manual_seed(0)
    entering, noise = (torch.randn(64, 256, DIMENSIONS, generator=generator) for _ in range(2))
    map_KK = torch.randn(DIMENSIONS, DIMENSIONS, generator=generator) / 8
    leaving = entering + change * (entering @ map_KK + noise)
    tokens, dimensions = (torch.randperm(size, generator=generator) for size in (256, DIMENSIONS))
    units = []
    for order in (torch.arange(256), tokens):
        turn = torch.arange(DIMENSIONS) if order is not tokens else dimensions
        e, x = (each[:, order][:, :, turn].contiguous() for each in (entering, leaving))
        known = Known(torch.zeros(DIMENSIONS), change * map_KK[turn][:, turn])
        sketches = (Sketches(each.expand(2, *each.shape), 8 * each.norm(dim=-1)) for each in (e, x))
        table = np.zeros((len(NAMES), 64))
        table[OF_PAIR] = pair_rows(*sketches, known)[0].double().numpy().T
        units.append(comparable(table))
    honest = np.maximum(np.subtract(*np.quantile(units[0], [0.75, 0.25], axis=1)), FLOORS)
    apart = np.abs(units[0] - units[1]).max(1)
    assert (apart <= 0.5 * honest)[OF_PAIR].all(), dict(zip(NAMES, (apart / honest).round(2), strict=True))
