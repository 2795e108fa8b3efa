"""A digest of a tensor's bits under a secret key: who does not know the key cannot make two tensors that share it.

    keyed = sum_gn P_g W_n (sum_r Q_r H_(8g+r)n)  (mod 2^64)
    H [T, N]: the bits as signed integers of 16 bits, or as bytes
    P, W: 64 bits, Q [8]: signed integers of 32 bits, all of them hashes of their index under the key

The weights of ``tensor_digest`` are public and its sums linear, so messages with equal digests can be made up: to turn
bits 15 and 31 of any two float32 elements over changes nothing in it, and a generalised birthday search (Wagner,
CRYPTO 2002) finds sixteen elements whose last bits do so. Here a sender would have to foretell a sum of weights that it
does not know.

How likely two given tensors are to share it, over the draw of the key, with weights as if independent and uniform
(after Carter and Wegman 1979; of integers modulo 2^K, as in Lemire and Kaser, The Computer Journal 57, 2014): let 2^a,
a <= 15, be the highest power of two that divides all differences of H. At an element where no higher one does, the
difference of the inner sum is 2^a times a number that is uniform modulo 2^32, so 2^i more divides it with probability
2^-i, and 2^j more what the sum with P makes of it with 2^-j. Then W leaves one chance in 2^(64 - a - i - j). Added up
over all j and i < 32 that is below 2^-40, and i = 32 has 2^-32: **below 2^-31** in all. To hit another difference than
zero is no easier, so sums of digests under different keys, one a tensor of a message, are as good.

The weights come of a hash that is no cipher (``hashing.py``), which is enough as long as nothing of them is known when
the message is sent: a key serves for one step, and its digests are told when all messages of the step have crossed.

Inner sums of eight rows are below 2^50, so the reference takes them as float64, exactly. Example, a single row h and
key weights Q_0 = 3, P_0 = 5, W = (7, 9): keyed = 5 * (7 * 3 * h_0 + 9 * 3 * h_1).
"""

from __future__ import annotations

import functools

import torch

from deepspeed_sentinel.kernels.dispatch import check_contiguous, check_output, tl, triton
from deepspeed_sentinel.kernels.hashing import hash_counters, hash_reference, seed_keys

GROUP = 8  # rows of an inner sum
_BLOCK = 1 << 16  # integers that the reference takes at once: as float64 they stay in a processor's own memory
_P, _W, _Q = (0xDAA66D2B, 0x78DDE6E4), (0x1715609D, 0xB54CDA56), 0x53845414  # streams of low and high halves


class DigestKey:
    """The key of one tensor of each message of a step.

    Attributes:
        seed_1: int64 [1], on the device.
        weights: of some groups of rows and some columns, see ``_weights``; made when they are first asked for.
    """

    def __init__(self, seed_1: torch.Tensor) -> None:
        self.seed_1 = seed_1
        self.weights = functools.cache(self._weights)

    def _weights(self, groups: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """P int64 [groups], Q float64 [8] and W int64 [columns]."""
        p_G, w_N = (
            hash_reference(self.seed_1[0], low, count) + hash_reference(self.seed_1[0], high, count) * (1 << 32)
            for (low, high), count in ((_P, groups), (_W, columns))
        )
        q_8 = hash_reference(self.seed_1[0], _Q, GROUP)
        return p_G, torch.where(q_8 >= 1 << 31, q_8 - (1 << 32), q_8).double(), w_N


def check_keyed(x: torch.Tensor, key: DigestKey | None, keyed_1: torch.Tensor | None) -> None:
    """Raise ValueError unless there are both a key and int64 [1] to write the digest to, or neither."""
    if (key is None) != (keyed_1 is None):
        raise ValueError(f"key and keyed_1 belong together, got {key} and {keyed_1}")
    if keyed_1 is not None:
        check_output("keyed_1", keyed_1, torch.int64, (1,), x)
        check_contiguous(keyed_1=keyed_1)


def keyed_digest_reference(bits_XRC: torch.Tensor, key: DigestKey) -> torch.Tensor:
    """The definition, of tensors of any contiguous elements [..., R, C], not bool: int64 [...]."""
    of_bytes = bits_XRC.element_size() == 1
    # A dimension of one element may have any stride and be contiguous all the same, so the view is of a flat tensor.
    halves_N = bits_XRC.contiguous().reshape(-1).view(torch.uint8 if of_bytes else torch.int16)
    halves_an_element = 1 if of_bytes else bits_XRC.element_size() // 2
    halves_XRN = halves_N.reshape(*bits_XRC.shape[:-1], bits_XRC.shape[-1] * halves_an_element)
    halves_YRN = halves_XRN.reshape(-1, *halves_XRN.shape[-2:])
    count, rows, columns = halves_YRN.shape
    groups = -(-rows // GROUP)
    p_G, q_8, w_N = key.weights(groups, columns)
    by_column_YN = torch.zeros(count, columns, dtype=torch.int64, device=bits_XRC.device)
    at_once = max(1, _BLOCK // max(1, count * columns * GROUP))
    for first in range(0, groups, at_once):
        block_YBN = halves_YRN[:, first * GROUP : (first + at_once) * GROUP].double()
        if missing := -block_YBN.shape[1] % GROUP:
            block_YBN = torch.nn.functional.pad(block_YBN, (0, 0, 0, missing))
        of_groups = block_YBN.reshape(-1, GROUP, columns)
        inner_YGN = torch.bmm(q_8.expand(len(of_groups), 1, GROUP), of_groups).long().view(count, -1, columns)
        by_column_YN += inner_YGN.mul_(p_G[first : first + at_once, None]).sum(1)
    return by_column_YN.mul_(w_N).sum(1).view(bits_XRC.shape[:-2])


@triton.jit
def row_weights(seed, r):
    """Q of rows r of a group, int64."""
    key0, key1 = seed_keys(seed, 0x53845414)
    return hash_counters(r, key0, key1).to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def group_weight(seed, group):
    """P, int64."""
    return _wide(seed, group, 0xDAA66D2B, 0x78DDE6E4)


@triton.jit
def column_weights(seed, columns):
    """W, int64."""
    return _wide(seed, columns, 0x1715609D, 0xB54CDA56)


@triton.jit
def _wide(seed, counters, low_stream: tl.constexpr, high_stream: tl.constexpr):
    low0, low1 = seed_keys(seed, low_stream)
    high0, high1 = seed_keys(seed, high_stream)
    low, high = hash_counters(counters, low0, low1), hash_counters(counters, high0, high1)
    return (high.to(tl.int64) << 32) + low.to(tl.int64)


@triton.jit
def add_rows(bits, q, p, low, high, WIDE: tl.constexpr):
    """Eight rows more: int64 sums by column of low halves, and of high ones where elements are WIDE, 32 bits."""
    if WIDE:
        low += p * tl.sum(((bits << 16) >> 16).to(tl.int64) * q[:, None], 0)
        high += p * tl.sum((bits >> 16).to(tl.int64) * q[:, None], 0)
    else:
        low += p * tl.sum(bits.to(tl.int64) * q[:, None], 0)
    return low, high


@triton.jit
def add_columns(seed, columns, low, high, WIDE: tl.constexpr):
    """What sums by column add to the digest, int64."""
    if WIDE:
        of_low = low * column_weights(seed, 2 * columns)
        return tl.sum(of_low + high * column_weights(seed, 2 * columns + 1), 0)
    else:
        return tl.sum(low * column_weights(seed, columns), 0)
