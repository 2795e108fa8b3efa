"""A machine is named for what it did, and not for the place that it was given in a run that goes on."""

from types import SimpleNamespace

import numpy as np
import pytest

from deepspeed_sentinel.engine.sentinel import Sentinel
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.exclusion import exclusions, read_saved, saved

BAD = Worker(1, 2)


class Run:
    """What a sentinel knows of convictions, in a mesh of 3 x 3 with a host for each worker."""

    def __init__(self, prefix):
        self._convictions = {}
        self._ranks = np.arange(9).reshape(3, 3)
        self.devices = SimpleNamespace(
            where=tuple(tuple(Device(f"{prefix}-{stage}{replica}", 0) for replica in range(3)) for stage in range(3))
        )
        self.gate = SimpleNamespace(
            judge=SimpleNamespace(record=SimpleNamespace(convicted=np.zeros((3, 3), bool))),
            columns=SimpleNamespace(wiring=None),
        )
        self.comparison = SimpleNamespace(unequal_in=lambda step: ())
        self.devices.step = lambda *args: None
        self.last_poisoned = None

    def convict(self, step):
        self.gate.judge.record.convicted[BAD] = True
        self.last_verdict = SimpleNamespace(
            step=step, newly_convicted=(BAD,), halt=None, proofs=(), contradicted=(), findings=()
        )
        Sentinel._after_step(self)

    @property
    def convicts(self):
        return Sentinel.convicts.fget(self)

    @property
    def hosts(self):
        return exclusions(self.convicts, self.devices.where, step=60)["hosts"]


def test_a_run_that_goes_on_elsewhere_names_the_machine_of_then():
    run, resumed = Run("old"), Run("new")
    run.convict(step=31)
    assert run.hosts == ["old-12"]
    resumed.gate.judge.record.convicted[BAD] = True
    resumed._convictions = read_saved(saved(run.convicts))
    assert resumed.convicts == run.convicts and resumed.hosts == ["old-12"]
    assert resumed.convicts[0].step == 31


def test_no_machine_is_named_where_it_is_not_known_which_it_was():
    resumed = Run("new")
    resumed.gate.judge.record.convicted[BAD] = True
    assert resumed.hosts == [] and "not known" in resumed.convicts[0].why


@pytest.mark.parametrize(
    "said",
    [
        None,
        3,
        [3, None],
        [{}],
        [{"worker": [[1], 2], "rank": 1, "device": {"host": "a", "slot": 0}, "step": 1, "why": ""}],
        [{"worker": [1], "rank": 1, "device": {}, "step": 1, "why": ""}],
        [{"worker": [1, 2], "rank": 1, "device": {"host": "two hosts", "slot": 0}, "step": 1, "why": ""}],
    ],
)
def test_what_is_none_in_a_checkpoint_is_left_out(said):
    assert read_saved(said) == {}
