"""Kinds of text that no mixture of one another resembles: what replicas learn from that each have a shard of their own.

All are made of Python's standard library, or made up: they are the same on every machine that has it.
"""

from __future__ import annotations

import base64
import json
import os
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deepspeed_sentinel import corpus

_LENGTH = 300_000  # bytes a kind
_LETTERS = "etaoinshrdlu"


def _library(*patterns: str) -> bytes:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for pattern in patterns for path in root.glob(pattern))
    return b"".join(path.read_bytes() for path in files)


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(_LETTERS, k=draw.randint(1, 7)))


def _python(draw: random.Random) -> bytes:
    return _library("[a-m]*.py")


def _prose(draw: random.Random) -> bytes:
    return _library("pydoc_data/topics.py").replace(b"\\n", b"\n")


def _charmaps(draw: random.Random) -> bytes:
    return _library("encodings/cp*.py")


def _json(draw: random.Random) -> bytes:
    rows = [
        {"name": _word(draw), "tags": [_word(draw), _word(draw)], "count": draw.randint(0, 30)} for _ in range(4000)
    ]
    return json.dumps(rows, indent=1).encode()


def _numbers(draw: random.Random) -> bytes:
    return "\n".join(",".join(f"{draw.gauss(0, 1):.3f}" for _ in range(8)) for _ in range(6000)).encode()


def _encoded(draw: random.Random) -> bytes:
    return base64.encodebytes(draw.randbytes(_LENGTH * 3 // 4))


def _markup(draw: random.Random) -> bytes:
    rows = (f'<tr id="{n}"><td>{_word(draw)}</td>\n    <td class="{_word(draw)}"/></tr>' for n in range(6000))
    return "\n".join(rows).encode()


def _genes(draw: random.Random) -> bytes:
    return "".join(draw.choices("ACGT", k=_LENGTH)).encode()


_MAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "python": _python,
    "prose": _prose,
    "charmaps": _charmaps,
    "json": _json,
    "numbers": _numbers,
    "encoded": _encoded,
    "markup": _markup,
    "genes": _genes,
}
KINDS = tuple(_MAKERS)


def tokens(folder: Path, tokenizer: str, kind: str) -> np.ndarray:
    """Tokens of a kind, kept in ``folder`` beside the prepared text whose tokenizer they share: shape [tokens]."""
    path = folder / f"{tokenizer}_kind_{kind}.npy"
    if not path.exists():
        text = _MAKERS[kind](random.Random(kind))[:_LENGTH]
        part = path.with_suffix(f".{os.getpid()}.npy")
        np.save(part, corpus.encoder(folder, tokenizer)(text))
        part.replace(path)
    return np.asarray(np.load(path, mmap_mode="r"))
