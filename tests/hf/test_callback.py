"""Of which steps a callback is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from deepspeed_sentinel.hf.callback import has_news

QUIET = dict.fromkeys(("findings", "disputed", "proofs", "differences", "cleared", "newly_convicted", "released"), ())


@pytest.mark.parametrize("what", QUIET)
def test_whatever_is_found_is_news(what):
    assert not has_news(SimpleNamespace(**QUIET, skip=False))
    assert has_news(SimpleNamespace(**{**QUIET, what: ("something",)}, skip=False))
