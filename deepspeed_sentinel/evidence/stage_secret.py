"""The secret of a stage, under which its workers digest what they receive: all of them share it, and no other stage.

A worker that knew it could make up two messages with one digest (``kernels/keyed_digest.py``), and have the honest
worker that is given one of them taken for wrong. So the sender of a message must not know it. Replica 0 of the first
stage, which is trusted not to lie, draws one a stage when Sentinel attaches, and hands each worker its own stage's,
sealed with what the two share (``keys.py``):

    sealed_r = ChaCha20-Poly1305(what the dealer and rank r share, for this alone; nonce 0).encrypt(secret of r's stage)

A key seals one message, so the nonce can be fixed. No secret is ever written anywhere; who attaches again draws others.
From it follow the keys of each step (``digest_keys``).
"""

from __future__ import annotations

import os

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.keys import KEY_BYTES, Keys, Secret
from deepspeed_sentinel.evidence.parts import MOST_TENSORS
from deepspeed_sentinel.mesh import Worker

_SEALED = KEY_BYTES + 16  # bytes, with the tag
_NONCE = bytes(12)
_PURPOSE = "stage secret"


def stage_secret(worker: Worker, ranks: np.ndarray, keys: Keys, control: Control, seed: int | None) -> Secret:
    """What the workers of this stage share. Collective over the control plane.

    Args:
        worker: this worker.
        ranks: int [S, R], the global rank of each worker.
        keys: this worker's.
        control: of all ranks.
        seed: the secrets follow from it, for runs that repeat exactly; None draws them from the operating system.

    Raises:
        SentinelError: what was dealt cannot be opened by all, on all ranks.
    """
    sealed = seal(ranks, keys, seed) if worker == (0, 0) else torch.zeros(ranks.size * _SEALED, dtype=torch.uint8)
    secret = unseal(control.of_dealer(sealed), int(ranks[worker]), keys.secret_with(int(ranks[0, 0])))
    opened = control.gather_words(int(secret is not None))[:, 0]
    if secret is None or not bool(opened.all()):
        without = [str(Worker(*place)) for place in np.argwhere(opened.numpy()[ranks] == 0).tolist()]
        raise SentinelError(
            f"the secret of its stage, dealt by {Worker(0, 0)}, cannot be opened by {', '.join(without)}: what crosses "
            "the control plane was altered on its way to them, or they say so. Resume without them, or find out what "
            "alters it."
        )
    return secret


def seal(ranks: np.ndarray, keys: Keys, seed: int | None) -> torch.Tensor:
    """Draw a secret for each stage and seal it for each worker: uint8 [ranks * 48], in the order of ranks."""
    if seed is None:
        drawn = os.urandom(KEY_BYTES)
    else:
        hkdf = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=b"deepspeed_sentinel/stages/1")
        drawn = hkdf.derive(str(seed).encode())
    of_ranks = [b""] * ranks.size
    for (stage, _), rank in np.ndenumerate(ranks):
        secret = Secret(drawn).key(_PURPOSE, stage)
        cipher = ChaCha20Poly1305(keys.secret_with(int(rank)).key(_PURPOSE))
        of_ranks[rank] = cipher.encrypt(_NONCE, secret, None)
    return torch.frombuffer(bytearray(b"".join(of_ranks)), dtype=torch.uint8)


def unseal(sealed: torch.Tensor, rank: int, shared: Secret) -> Secret | None:
    """A rank's own part of what was dealt, by what it shares with the dealer; None if it was altered."""
    own = bytes(sealed[rank * _SEALED : (rank + 1) * _SEALED].tolist())
    try:
        return Secret(ChaCha20Poly1305(shared.key(_PURPOSE)).decrypt(_NONCE, own, None))
    except InvalidTag:
        return None


def digest_keys(secret: Secret, direction: int, step: int, told: int) -> torch.Tensor:
    """int64 [MOST_TENSORS], one for each tensor of a message, for the messages received from one direction in a step.

    Args:
        secret: of the stage.
        direction: of the messages.
        step: the engine's global step.
        told: how often digests were told since attaching: a step that is repeated has other keys.
    """
    drawn = secret.key("keyed digest", direction, step, told, size=8 * MOST_TENSORS)
    return torch.frombuffer(bytearray(drawn), dtype=torch.int64)
