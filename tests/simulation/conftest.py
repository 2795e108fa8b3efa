"""Simulations that take a second: a few short sequences, the text tokenised once for all tests."""

import pytest

from deepspeed_sentinel.simulation.options import SimulationOptions

SMALL = {"stages": 4, "replicas": 4, "steps": 12, "start": 6, "sequence": 16, "micro_batch_size": 1}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def options():
    def build(**changes):
        return SimulationOptions(**{**SMALL, **changes})

    return build
