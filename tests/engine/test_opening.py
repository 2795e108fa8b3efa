"""A guarded run says so in one line that DeepSpeed shows, and says once when judging begins."""

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
from deepspeed_sentinel.engine.opening import opening
from deepspeed_sentinel.engine.telling import Telling
from deepspeed_sentinel.mesh import Mesh
from deepspeed_sentinel.telemetry.devices import NOBODY
from deepspeed_sentinel.telemetry.who import Who


@pytest.fixture
def log(caplog):
    assert logger.level == logging.WARNING, "what DeepSpeed shows"
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def line(mesh, **block):
    return opening(SentinelConfig.parse({"enabled": True, **block}).of_mesh(mesh), mesh)


def test_the_line_has_what_is_guarded_and_what_is_not_seen():
    told = line(Mesh(4, 3), warmup_steps=7)
    assert told.startswith("guarding 4 stages x 3 replicas, action 'quarantine', wiring 'heal', conviction by proof; ")
    assert "judging begins after 7 clean steps" in told
    assert 'goes unseen without them: "twins": {"every": 100} finds it for 0.67 % of the data' in told


def test_who_only_observes_guards_nothing_and_says_so():
    told = line(Mesh(4, 3), action="observe")
    assert told.startswith("watching 4 stages x 3 replicas, action 'observe': what is found is reported, ")
    assert "nothing is kept out of the weights and no run is stopped" in told and "guarding" not in told
    few = line(Mesh(4, 1), action="observe") + line(Mesh(4, 2), action="observe")
    assert "left out" not in few and "exclude" not in few


@pytest.mark.parametrize("action", ["exclude", "quarantine", "halt"])
def test_what_keeps_things_out_guards(action):
    assert line(Mesh(4, 3), action=action).startswith(f"guarding 4 stages x 3 replicas, action {action!r}, wiring ")


@pytest.mark.parametrize(
    ("replicas", "said"),
    [(1, "there is nothing to compare with"), (2, "there is no majority, so only a replica that changes")],
)
def test_the_line_says_what_few_replicas_cannot_do(replicas, said):
    assert said in line(Mesh(4, replicas)) and said not in line(Mesh(4, 3))
    assert "conviction by statistics" in line(Mesh(4, replicas))


def test_with_twin_steps_the_line_has_their_price():
    told = line(Mesh(4, 4), twins={"every": 50})
    assert "twin steps one in 50 at random, which costs 1.5 % of the data, and on suspicion" in told


def test_a_run_begins_with_one_line_and_tells_once_when_judging_begins(log, tmp_path, one_rank):
    config = SentinelConfig.parse({"enabled": True, "output_dir": str(tmp_path)}).of_mesh(Mesh(4, 3))
    who = Who(np.arange(12).reshape(4, 3), [[NOBODY] * 3] * 4)
    telling = Telling(config, Mesh(4, 3), SimpleNamespace(of_first=lambda text: text), who)
    telling.start(0)
    assert [record.getMessage()[:19] for record in log.records] == ["[sentinel] guarding"]
    log.clear()
    quiet = World().step()
    for step, warming_up in enumerate([True, True, False, False]):
        telling.verdict(replace(quiet, step=step, warming_up=warming_up))
    assert [record.getMessage() for record in log.records] == [
        "[sentinel] step 2: judging begins: what leaves the fences is an alarm from here on"
    ]
