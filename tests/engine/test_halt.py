"""At a halt the reason comes first, whatever cannot be written then."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from deepspeed.utils import logger

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine import sentinel as module
from deepspeed_sentinel.engine.sentinel import Sentinel
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.errors import SentinelHalt
from deepspeed_sentinel.mesh import Mesh
from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.who import Who

FULL = OSError(28, "No space left on device")
VERDICT = SimpleNamespace(step=31, halt="worker (stage 1, replica 2) convicted")


def full(*_, **__):
    raise FULL


@pytest.fixture
def codes(monkeypatch):
    """With which codes the process is to end."""
    codes = []
    monkeypatch.setattr(module, "ends_with", codes.append)
    return codes


@pytest.fixture
def halting(tmp_path, one_rank):
    """As much of a Sentinel as halts."""
    config = SentinelConfig.parse({"enabled": True, "output_dir": str(tmp_path)})
    who = Who(np.arange(12).reshape(4, 3), [[Device("node", 3 * stage + at) for at in range(3)] for stage in range(4)])
    telling = Telling(config.of_mesh(Mesh(4, 3)), Mesh(4, 3), SimpleNamespace(of_first=lambda text: text), who)
    return SimpleNamespace(
        config=config,
        engine=SimpleNamespace(save_checkpoint=lambda folder: True),
        convicts=("stage 1, replica 2 (rank 5, node-03)",),
        write_exclusions=lambda: None,
        _telling=telling,
    )


def test_a_halt_names_its_reason_the_checkpoint_and_the_machines(halting, codes):
    with pytest.raises(
        SentinelHalt, match=r"stopped in step 31: worker .* Checkpoint without .*halt_checkpoint"
    ) as told:
        Sentinel._halt(halting, VERDICT)
    assert "Start again without stage 1, replica 2 (rank 5, node-03)" in str(told.value) and codes == [75]


@pytest.mark.parametrize("error", [FULL, RuntimeError("PytorchStreamWriter failed writing file"), ValueError("moved")])
def test_a_checkpoint_that_cannot_be_written_is_named_after_the_reason(halting, codes, error):
    def fails(_):
        raise error

    halting.engine.save_checkpoint = fails
    with pytest.raises(SentinelHalt, match=r"stopped in step 31: worker .* convicted\. No checkpoint") as told:
        Sentinel._halt(halting, VERDICT)
    assert str(error) in str(told.value) and "Start again without stage 1" in str(told.value)
    assert told.value.__cause__ is error and codes == [75]


def test_so_is_what_to_leave_out(halting, codes, caplog):
    halting.write_exclusions = halting.engine.save_checkpoint = full
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name), pytest.raises(SentinelHalt, match="convicted"):
        Sentinel._halt(halting, VERDICT)
    logger.removeHandler(caplog.handler)
    assert "cannot write which machines to leave out: [Errno 28]" in caplog.text and codes == [75]


def test_a_log_of_events_that_cannot_be_closed_ends_nothing(halting, caplog):
    halting._telling._voice._log.close, halting._telling._voice._log.write = full, full
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        halting._telling.close()
        halting._telling.start(0)
    logger.removeHandler(caplog.handler)
    assert caplog.text.count("No space left on device") == 1, "told once"
