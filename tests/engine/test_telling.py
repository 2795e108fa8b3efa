"""What the log is told of convicted workers."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from deepspeed.utils import logger

sys.path.insert(0, str(Path(__file__).parents[1] / "judgement"))
from synthetic import World

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.evidence.table import NAMES
from deepspeed_sentinel.judgement.proof import Proof
from deepspeed_sentinel.mesh import FORWARD, Mesh, Worker

CULPRIT = Worker(1, 2)
PROOF = Proof(CULPRIT, 2, FORWARD, (0,), 2, 3, trusted=False)


@pytest.fixture
def telling(tmp_path, one_rank):
    config = SentinelConfig.parse({"enabled": True, "output_dir": str(tmp_path)})
    return Telling(config, Mesh(4, 3), SimpleNamespace(of_first=lambda text: text))


@pytest.fixture
def log(caplog):
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


def attacked(convicted, newly=()):
    """A step in which one worker is blamed and proved."""
    world = World()
    world.warm_up()

    def change(values):
        values[:, 0, 1, 2, :, NAMES.index("energy")] *= 50

    marked = np.zeros((4, 3), bool)
    for worker in convicted:
        marked[worker] = True
    return replace(world.step(change), convicted=marked, newly_convicted=tuple(newly), proofs=(PROOF,))


def test_what_a_convicted_worker_goes_on_doing_is_counted_and_told_at_the_end(telling, log, tmp_path):
    first = attacked([CULPRIT], newly=[CULPRIT])
    assert first.findings and all(finding.worker == CULPRIT for finding in first.findings)
    telling.verdict(first)
    assert f"{CULPRIT} CONVICTED" in log.text and log.text.count(str(CULPRIT)) > 2, "why is told once"
    log.clear()
    for _ in range(3):
        telling.verdict(attacked([CULPRIT]))
    assert str(CULPRIT) not in log.text
    telling.close()
    number = 3 * (len(first.findings) + 1)
    assert f"{CULPRIT}: {number} alarms, disputes and proofs since it was convicted" in log.text
    assert (tmp_path / "events.jsonl").read_text().count('"kind": "proof"') == 4, "events have them all"


def test_of_others_everything_is_told(telling, log):
    telling.verdict(attacked([Worker(2, 0)]))
    assert str(CULPRIT) in log.text
    telling.close()
    assert "since it was convicted" not in log.text
