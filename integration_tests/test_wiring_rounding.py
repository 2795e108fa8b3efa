"""Columns dealt anew in every step change with four replicas what is added up in which order, and nothing more."""

from __future__ import annotations

import numpy as np
import pytest

from integration_tests.runs import run_scenarios
from integration_tests.scenario import Scenario

pytestmark = pytest.mark.long
PLAIN = Scenario(name="as they are", steps=50, hidden=64, lengths=(32,))
# The same data in other places: plain DeepSpeed adds them up in another order.
ORDERS = {"turned": (1, 2, 3, 0), "swapped": (1, 0, 3, 2), "mirrored": (3, 2, 1, 0), "crossed": (2, 0, 3, 1)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounding")
    block = {"enabled": True, "output_dir": str(folder / "logs"), "seed": 0}
    scenarios = [PLAIN, *(PLAIN.with_(name=name, data_replicas=order) for name, order in ORDERS.items())]
    for wiring in ("static", "shuffle"):
        scenarios.append(PLAIN.with_(name=wiring, sentinel={**block, "wiring": wiring}))
    return run_scenarios(scenarios, stages=4, replicas=4, folder=folder, timeout=1200)


def apart(runs, name, other):
    """The largest difference of a loss and of a weight, after 50 steps."""
    losses = np.abs(np.subtract(runs[name][0].losses, runs[other][0].losses))
    weights = [
        float((one.weights[key] - two.weights[key]).abs().max())
        for one, two in zip(runs[name], runs[other], strict=True)
        for key in one.weights
    ]
    return float(losses.max()), max(weights)


def test_shuffled_columns_are_apart_by_no_more_than_plain_runs_that_add_up_in_another_order(runs):
    assert apart(runs, "static", "as they are") == (0.0, 0.0)
    by_order = {name: apart(runs, name, "as they are") for name in ORDERS}
    shuffled = apart(runs, "shuffle", "static")
    print(by_order, shuffled)
    assert len({str(verdict["wiring"]) for verdict in runs["shuffle"][0].verdicts}) > 40
    for mine, theirs in zip(shuffled, zip(*by_order.values(), strict=True), strict=True):
        assert 0 < mine <= 2 * max(theirs), "twice, since four orders are a sample of many"
