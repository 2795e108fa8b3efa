"""Hooks that let worker (1, 1) answer an audit as it should not; for ``Scenario.hook``."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.response import hearing

LIAR = Worker(1, 1)
_hand_in = hearing.hand_in


def _is_liar(engine: Any) -> bool:
    # 120 seconds are for slow networks
    hearing.PATIENCE_SECONDS, hearing.SHORT_PATIENCE_SECONDS = 10.0, 2.0
    hearing.hand_in = _hand_in
    return engine.sentinel.worker == LIAR


def silent(engine: Any, step: int) -> None:
    """Hands in nothing."""
    if _is_liar(engine):
        hearing.hand_in = lambda *_: None


def garbage(engine: Any, step: int) -> None:
    """Hands in what no key has signed."""

    def hand_in(pieces: Any, addresses: Sequence[str], port: int, seconds: float) -> None:
        with socket.create_connection((addresses[0], port)) as connection:
            connection.sendall(secrets.token_bytes(9000))

    if _is_liar(engine):
        hearing.hand_in = hand_in


def another(engine: Any, step: int) -> None:
    """Hands in a message that did not cross."""
    if _is_liar(engine):
        kept = engine.sentinel._collector.testify

        def testify(end: tuple[int, int]) -> Any:
            statement = kept(end)
            return replace(statement, tensors=tuple(-tensor for tensor in statement.tensors))

        engine.sentinel.gate.hearing._testify = testify
