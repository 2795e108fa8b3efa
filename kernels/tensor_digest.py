"""A checksum of a tensor's bits that two devices compute in any order with the same result.

    digest_j = sum_tc V_jt f(B_tc) W_jc  (mod 2^32)        j = 0, 1;  B [T, C]: the bits as integers of 32 or fewer bits
    V_jt     = P_j(t div 8) Q_j(t mod 8)                   P, Q, W: fixed odd weights, hashes of their index
    f(b)     = b ^ (b >> 16)                               of 32 bits without a sign

Partial sums of any shape add up to it, and since f is a bijection and the weights are odd no single changed element is
lost. Without f, what changes only the highest bit of an even number of elements, such as the sign of a whole message,
would cancel; with it that has a chance of about 2^-32, any other change one of 2^-64. A kernel hashes weights once in
eight rows. It guards against corruption and against two reports that differ; its weights are no secret, so tensors that
share it can be made up. Where that matters, the digest under a key is taken in the same read (``keyed_digest.py``).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from deepspeed_sentinel.kernels.dispatch import LAUNCH, runs_on_gpu, tl, triton
from deepspeed_sentinel.kernels.hashing import mix, mix_reference
from deepspeed_sentinel.kernels.keyed_digest import (
    GROUP,
    DigestKey,
    add_columns,
    add_rows,
    check_keyed,
    group_weight,
    keyed_digest_reference,
    row_weights,
)

DIGEST_WORDS = 2
INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32, 16: torch.int32}
_BR, _BC = 128, 1024  # a program's rows and columns
_COLUMNS, _GROUPS, _ROWS = 0x9E3779B9, 0x3C6EF372, 0xDAA66D2B  # counters of the three kinds of weights start here


def tensor_digest(x: torch.Tensor, key: DigestKey | None = None, keyed_1: torch.Tensor | None = None) -> torch.Tensor:
    """The digest of a tensor of any dtype and shape, int32 [2]; see the head of this file.

    Args:
        x: the tensor.
        key: optional, of the keyed digest.
        keyed_1: int64 [1], out: the digest under the key, if there is one.

    Raises:
        ValueError: ``keyed_1`` does not fit, or there is one without a key.
    """
    check_keyed(x, key, keyed_1)
    bits_RC = _bits(x.detach())
    if not runs_on_gpu(bits_RC):
        if key is not None and keyed_1 is not None:
            keyed_1.copy_(keyed_digest_reference(bits_RC, key))
        return tensor_digest_reference(bits_RC)
    rows, columns = bits_RC.shape
    digest_2 = torch.zeros(DIGEST_WORDS, dtype=torch.int32, device=bits_RC.device)
    if keyed_1 is not None:
        keyed_1.zero_()
    _digest_kernel[(-(-columns // _BC), -(-rows // _BR))](
        bits_RC,
        digest_2,
        key.seed_1 if key else None,
        keyed_1,
        rows,
        columns,
        KEYED=key is not None,
        WIDE=bits_RC.dtype == torch.int32,
        BR=_BR,
        BC=_BC,
        GROUP=GROUP,
        num_warps=4,
        **LAUNCH,
    )
    return digest_2


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as contiguous integers [R, C], its last dimension along the columns."""
    x = x.view(torch.uint8) if x.dtype == torch.bool else x.resolve_conj().resolve_neg()
    x_RC = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1)
    # flat, since a tensor of one column may be contiguous with any stride along it
    bits_N = x_RC.reshape(-1).contiguous().view(INTEGER_VIEW[x.element_size()])
    return bits_N.view(x_RC.shape[0], -1)


def tensor_digest_reference(bits_RC: torch.Tensor) -> torch.Tensor:
    """The digest of integers of 32 or fewer bits: int32 [2]."""
    return weighted_sum(bits_RC.to(torch.int32), *digest_weights(*bits_RC.shape, bits_RC.device))


def weighted_sum(bits_XRC: torch.Tensor, row_weights_2R: torch.Tensor, column_weights_2C: torch.Tensor) -> torch.Tensor:
    """V f(B) W of bits [..., R, C] and weights [2, R] and [2, C]: int32 [..., 2]."""
    bits_XRC = spread_reference(bits_XRC)
    if bits_XRC.device.type == "cpu":
        by_column_X2C = row_weights_2R @ bits_XRC
    else:  # there is no integer matrix product on a GPU
        by_column_X2C = torch.stack(
            [(bits_XRC * weights_R[:, None]).sum(-2, dtype=torch.int32) for weights_R in row_weights_2R], dim=-2
        )
    return (by_column_X2C * column_weights_2C).sum(-1, dtype=torch.int32)


def spread_reference(bits: torch.Tensor) -> torch.Tensor:
    """f of int32 bits, see the head of this file."""
    return (bits >> 16).bitwise_and_(0xFFFF).bitwise_xor_(bits)


@lru_cache(maxsize=64)
def digest_weights(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights V int32 [2, rows] and W int32 [2, columns], made on the device."""
    group_2G, row_2R = _odd_pair(-(-rows // GROUP), _GROUPS, device), _odd_pair(GROUP, _ROWS, device)
    row_weights_2R = (group_2G[:, :, None] * row_2R[:, None, :]).flatten(1)[:, :rows]
    return _signed(row_weights_2R & 0xFFFFFFFF).contiguous(), _signed(_odd_pair(columns, _COLUMNS, device))


def _odd_pair(count: int, start: int, device: torch.device) -> torch.Tensor:
    """int64 [2, count]: two odd 32-bit weights a counter, the second derived from the first one's hash."""
    h = mix_reference(torch.arange(count, dtype=torch.int64, device=device) + start & 0xFFFFFFFF)
    return torch.stack([h, (h ^ (h >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF]) | 1


def _signed(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@triton.jit
def odd_weights(counters, start: tl.constexpr):
    h = mix(tl.cast(counters, tl.uint32) + start)
    second = (h ^ (h >> 15)) * 0x2C1B3C6D
    return (h | 1).to(tl.int32, bitcast=True), (second | 1).to(tl.int32, bitcast=True)


@triton.jit
def spread(bits):
    unsigned = bits.to(tl.uint32, bitcast=True)
    return (unsigned ^ (unsigned >> 16)).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["key_ptr", "keyed_ptr"])
def _digest_kernel(
    bits_ptr,
    digest_ptr,
    key_ptr,
    keyed_ptr,
    rows,
    columns,
    KEYED: tl.constexpr,
    WIDE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    GROUP: tl.constexpr,
):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    r = tl.arange(0, GROUP)
    first = tl.program_id(1).to(tl.int64) * BR
    q0, q1 = odd_weights(r, 0xDAA66D2B)
    word0 = tl.zeros([BC], tl.int32)
    word1 = tl.zeros([BC], tl.int32)
    low = tl.zeros([BC], tl.int64)
    high = tl.zeros([BC], tl.int64)
    seed = tl.load(key_ptr) if KEYED else 0
    q = row_weights(seed, r) if KEYED else r
    for t in range(first, tl.minimum(first + BR, rows), GROUP):
        inside = (t + r < rows)[:, None] & (c < columns)[None, :]
        places = (t + r)[:, None] * columns + c[None, :]
        bits = tl.load(bits_ptr + places, mask=inside, other=0).to(tl.int32)
        wide = spread(bits)
        p0, p1 = odd_weights(t // GROUP, 0x3C6EF372)
        word0 += p0 * tl.sum(wide * q0[:, None], 0)
        word1 += p1 * tl.sum(wide * q1[:, None], 0)
        if KEYED:
            low, high = add_rows(bits, q, group_weight(seed, t // GROUP), low, high, WIDE)
    w0, w1 = odd_weights(c, 0x9E3779B9)
    # Sums of integers have the same bits in any order.
    tl.atomic_add(digest_ptr, tl.sum(word0 * w0, 0), sem="relaxed")
    tl.atomic_add(digest_ptr + 1, tl.sum(word1 * w1, 0), sem="relaxed")
    if KEYED:
        tl.atomic_add(keyed_ptr, add_columns(seed, c, low, high, WIDE), sem="relaxed")
