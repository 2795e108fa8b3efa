"""Secrets that two workers share and nobody else knows, whichever two they are.

Every worker makes an X25519 key pair (RFC 7748) when it attaches, and all learn each other's public keys in one gather
of 32 bytes. From then on any two agree on a secret without another word, so that workers which become neighbours later
need no collective for it. HKDF with SHA-256 (RFC 5869) makes an independent number of it for each purpose:

    secret        = HKDF-Extract(salt = lower rank's public key | upper rank's, X25519(own private key, other's public))
    number(...)   = 62 bits of HKDF-Expand(secret, info = "deepspeed_sentinel/sketches/1" and the purpose)

Nothing of it is ever written anywhere. Public keys are not authenticated: who can alter what crosses the control group
can stand between two workers, as it can alter their reports.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence.control import Control

BITS = 62  # of a number: what fits an int64 seed, with room
KEY_BYTES = 32
_DOMAIN = b"deepspeed_sentinel/sketches/1"


class Secret:
    """What some workers share, most often two.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def number(self, *purpose: str | int) -> int:
        """A number from 0 to 2^62 - 1 for one purpose; no other purpose's number tells anything about it.

        Example: ``number("sample", 3, 17)`` is the same at both workers, and unrelated to ``number("sample", 3, 18)``.

        Args:
            purpose: words without a slash, and whole numbers.
        """
        return int.from_bytes(self.key(*purpose, size=8), "big") >> (64 - BITS)

    def key(self, *purpose: str | int, size: int = KEY_BYTES) -> bytes:
        """Up to 8,160 bytes for one purpose, likewise."""
        info = b"/".join([_DOMAIN, *(str(part).encode() for part in purpose)])
        return HKDFExpand(algorithm=SHA256(), length=size, info=info).derive(self._key)


class Keys:
    """The key pair of one worker and everybody's public keys.

    Args:
        rank: of this worker.
        private: its private key.
        public: public keys of all ranks, 32 bytes each.
    """

    def __init__(self, rank: int, private: X25519PrivateKey, public: Sequence[bytes]) -> None:
        self._rank = rank
        self._private = private
        self._public = tuple(public)
        self._with = functools.cache(self._agree)

    @classmethod
    def exchange(cls, seed: int | None, control: Control) -> Keys:
        """Make this rank's keys and learn all others'. Collective over the control plane.

        Args:
            seed: all private keys follow from it, for runs that repeat exactly: whoever reads it knows every secret.
                None draws them from the operating system.

        Raises:
            SentinelError: a public key is none that a key pair can have, on all ranks.
        """
        rank = dist.get_rank()
        private = private_key(seed, rank)
        own = torch.frombuffer(bytearray(private.public_key().public_bytes_raw()), dtype=torch.uint8)
        keys = cls(rank, private, [bytes(key.tolist()) for key in control.all_gather(own)])
        for other in range(dist.get_world_size()):
            keys._shared(other)  # so that a useless key ends all ranks here, and not two of them later
        return keys

    def secret_with(self, rank: int) -> Secret:
        """The secret that this worker and another one share; agreed when it is first asked for."""
        return self._with(rank)

    def _agree(self, rank: int) -> Secret:
        lower, upper = sorted((self._rank, rank))
        salt = self._public[lower] + self._public[upper]
        return Secret(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=_DOMAIN).derive(self._shared(rank)))

    def _shared(self, rank: int) -> bytes:
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(self._public[rank]))
        except ValueError as error:
            raise SentinelError(
                f"rank {rank} gave {self._public[rank].hex()} as its public key, which belongs to no key pair (its "
                "secrets would be known to everybody). Resume without it, or find out what alters its messages."
            ) from error


def private_key(seed: int | None, rank: int) -> X25519PrivateKey:
    """A rank's private key: drawn from the operating system, or what follows from a seed."""
    if seed is None:
        return X25519PrivateKey.generate()
    info = b"/".join([_DOMAIN, b"private key", str(rank).encode()])
    return X25519PrivateKey.from_private_bytes(
        HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(str(seed).encode())
    )
