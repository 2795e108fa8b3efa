"""Spans in a trace of torch.profiler, so that what Sentinel costs can be seen there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """``sentinel::name`` while a profiler runs. Without one it costs a look at a flag; the span itself is dearer."""
    return record_function(f"sentinel::{name}") if torch.autograd._profiler_enabled() else _NOTHING
