"""Whether an error is of communication, which tells that some rank is gone, and what of its text is worth repeating."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch.distributed as dist

_GLOO = re.compile(r"\[(?:enforce fail at )?\S*gloo/\S+:\d+\]\s*")
_OF_GLOO = "Application timeout caused pair closure"  # the one that it raises without its place
_WORDS = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "broken pipe")
_ADVICE = re.compile(r"\.?\s*This is typically caused by .*", re.DOTALL)
_FOLDER = str(Path(dist.__file__).parent)


def is_communication(error: BaseException) -> bool:
    """Whether torch raised it because a peer, a link or the store failed.

    A user's own error is none, whatever its text says: it counts where it was raised, and whether gloo signed it.
    """
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if _GLOO.match(text) or text.startswith(_OF_GLOO):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    raised_by_torch = bool(frames) and frames[-1].filename.startswith(_FOLDER)
    return raised_by_torch and any(word in text.lower() for word in _WORDS)


def in_short(error: BaseException) -> str:
    """What happened, without the place in gloo's source and its advice to look into the logs of somebody unnamed.

    Example: ``[/.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:4928. This is typically caused
    by a remote worker crashing. Check ...`` becomes ``Connection closed by peer [10.0.0.7]:4928``.
    """
    return _ADVICE.sub("", _GLOO.sub("", str(error))).strip().rstrip(".")
