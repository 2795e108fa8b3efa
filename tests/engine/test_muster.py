"""A guard on a part of the ranks would stop them all: who is missing is named."""

import logging
import threading

import pytest
import torch.distributed as dist
from deepspeed.utils import logger

from deepspeed_sentinel.engine import muster as module
from deepspeed_sentinel.engine.muster import muster
from deepspeed_sentinel.errors import SentinelError


@pytest.fixture
def same_turn(monkeypatch):
    """As in processes of their own: each counts its Sentinels for itself."""
    monkeypatch.setattr(module, "_turns", iter([0] * 9))


def test_who_does_not_come_is_named_before_it_is_given_up(same_turn, caplog):
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(SentinelError, match=r"^ranks 0, 2 do not guard.* same \"sentinel\" block"):
            muster(dist.HashStore(), 1, 4 - 1, limit=0.5, patience=0.1)
    finally:
        logger.removeHandler(caplog.handler)
    assert "waiting for ranks 0, 2, which do not guard yet" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_all_who_come_go_on(same_turn):
    store, gone_on = dist.HashStore(), []
    others = [
        threading.Thread(target=lambda rank=rank: (muster(store, rank, 3, limit=20), gone_on.append(rank)))
        for rank in (1, 2)
    ]
    for other in others:
        other.start()
    assert not gone_on
    muster(store, 0, 3, limit=20)
    for other in others:
        other.join(20)
    assert sorted(gone_on) == [1, 2]


def test_a_later_sentinel_waits_anew():
    store = dist.HashStore()
    muster(store, 0, 1, limit=1)
    store.set("sentinel/0/1", "here")
    with pytest.raises(SentinelError, match="ranks 1 do not guard"):
        muster(store, 0, 2, limit=0.1)
