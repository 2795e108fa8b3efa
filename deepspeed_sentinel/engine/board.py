"""What the ranks of one attempt write for each other into the rendezvous store, each line signed by its writer.

The store outlives an attempt (torchrun keeps it over restarts), anybody who reaches its port may write into it, and it
has no notion of who wrote what. So every rank draws an Ed25519 key (RFC 8032) when it attaches, all learn each
other's public keys in one gather, and

    prefix of all keys   = "deepspeed_sentinel/" and the SHA-256 of all public keys: of this attempt and no other
    value                = signature of (prefix, kind, rank, text), and the text
    <prefix>/beat/<rank> = the last heartbeat
    <prefix>/post/<rank> = what a rank has to say about the end of the run, empty until then
    <prefix>/posts       = how many have said something: while it is missing, one look is enough

A line that its rank did not sign counts as none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from hashlib import sha256
from typing import TypeVar

import torch
import torch.distributed as dist
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from deepspeed_sentinel.evidence.control import Control

_Answer = TypeVar("_Answer")
_SIGNATURE_BYTES = 64


class Board:
    """Lines of the ranks of one attempt. Collective to create.

    Every method raises RuntimeError when the store does not answer; the next call connects anew.

    Args:
        control: gathers of all ranks.
        patience: seconds to wait for an answer of the store.
    """

    def __init__(self, control: Control, patience: float) -> None:
        self._rank = dist.get_rank()
        self._private = Ed25519PrivateKey.generate()
        own = torch.frombuffer(bytearray(self._private.public_key().public_bytes_raw()), dtype=torch.uint8)
        keys = [bytes(key.tolist()) for key in control.all_gather(own)]
        self._public = [Ed25519PublicKey.from_public_bytes(key) for key in keys]
        attempt = sha256(b"".join(keys)).hexdigest()[:32]
        self._prefix = f"deepspeed_sentinel/{attempt}"
        self._patience = timedelta(seconds=patience)
        self._lock = threading.Lock()
        self._connection: dist.Store | None = None
        # Whoever reads finds all keys there: a missing one would keep it waiting.
        self.write_beat("")
        self._write("post", "")

    @property
    def connected(self) -> bool:
        """Whether the store answered last time."""
        return self._connection is not None

    def write_beat(self, text: str) -> None:
        self._write("beat", text)

    def read_beats(self, ranks: Iterable[int]) -> dict[int, str]:
        """The last heartbeat of each rank; ranks without a line of their own are left out."""
        return self._read("beat", list(ranks))

    def post(self, text: str) -> None:
        """Say something for all to read; of several posts of one rank the last one stands."""
        order = self._ask(lambda store: store.add(f"{self._prefix}/posts", 1))
        self._write("post", f"{order} {text}")

    def read_post(self, ranks: Iterable[int]) -> tuple[int, str] | None:
        """The rank that said something first, and what."""
        if not self._ask(lambda store: store.check([f"{self._prefix}/posts"])):
            return None
        posts = []
        for rank, line in self._read("post", list(ranks)).items():
            order, _, text = line.partition(" ")
            if order.isdigit():
                posts.append((int(order), rank, text))
        return min(posts)[1:] if posts else None

    def _write(self, kind: str, text: str) -> None:
        key = self._key(kind, self._rank)
        line = self._private.sign(_signed(key, text)).hex() + text
        self._ask(lambda store: store.set(key, line))

    def _read(self, kind: str, ranks: Sequence[int]) -> dict[int, str]:
        keys = [self._key(kind, rank) for rank in ranks]
        lines = self._ask(lambda store: store.multi_get(keys))
        read = {}
        for rank, key, line in zip(ranks, keys, lines, strict=True):
            try:
                signature = bytes.fromhex(line[: 2 * _SIGNATURE_BYTES].decode())
                text = line[2 * _SIGNATURE_BYTES :].decode()
                self._public[rank].verify(signature, _signed(key, text))
            except (ValueError, InvalidSignature):
                continue
            read[rank] = text
        return read

    def _key(self, kind: str, rank: int) -> str:
        return f"{self._prefix}/{kind}/{rank}"

    def _ask(self, question: Callable[[dist.Store], _Answer]) -> _Answer:
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = _connect(self._patience)
                return question(self._connection)
            except RuntimeError:
                # After a late answer the next one would be taken for it.
                self._connection = None
                raise


def _signed(key: str, text: str) -> bytes:
    return f"{key}\n{text}".encode()


def rendezvous_host() -> str:
    """A host that all ranks could reach when they met."""
    store = _default_store()
    return store.host if isinstance(store, dist.TCPStore) else os.environ.get("MASTER_ADDR", "localhost")


def _default_store() -> dist.Store:
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def _connect(patience: timedelta) -> dist.Store:
    """A second client of the default store: the first may be blocked in a collective's set-up."""
    store = _default_store()
    if not isinstance(store, dist.TCPStore):
        return store
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=patience)
