import math

import numpy as np
import pytest
import torch

from deepspeed_sentinel.kernels.hashing import hash_reference
from deepspeed_sentinel.kernels.keyed_digest import DigestKey, keyed_digest_reference
from deepspeed_sentinel.kernels.message_statistics import message_statistics
from deepspeed_sentinel.kernels.tensor_digest import tensor_digest
from integration_tests.variants import some

SEED = 0x123456789ABCDEF


def key(seed=SEED, device="cpu"):
    return DigestKey(torch.tensor([seed], device=device))


def message(rows=37, columns=300, dtype=torch.float32):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x[3, 4] = math.nan
    return x.to(dtype)


def keyed(x, seed=SEED):
    out = torch.empty(1, dtype=torch.int64, device=x.device)
    tensor_digest(x, key(seed, x.device), out)
    return int(out)


def reference(x, seed=SEED):
    """The same, whatever runs the kernels."""
    return int(keyed_digest_reference(x, key(seed)))


def bits_turned(x, bits, *where):
    """The same tensor with some bits of some elements turned over."""
    changed = x.clone()
    integers = changed.view(torch.int32 if x.element_size() == 4 else torch.int16)
    for place in where:
        integers[place] ^= int(np.int64(bits).astype(np.int32 if x.element_size() == 4 else np.int16))
    return changed


def by_hand(x, seed):
    """The formula, in Python's own integers."""
    halves = x.contiguous().view(torch.uint8 if x.element_size() == 1 else torch.int16)
    rows, columns = halves.shape

    def hashes(stream, count):
        return hash_reference(torch.tensor(seed), stream, count).tolist()

    q = [number - (number >> 31 << 32) for number in hashes(0x53845414, 8)]
    p, w = (
        [low + (high << 32) for low, high in zip(hashes(low, count), hashes(high, count), strict=True)]
        for low, high, count in ((0xDAA66D2B, 0x78DDE6E4, -(-rows // 8)), (0x1715609D, 0xB54CDA56, columns))
    )
    total = sum(p[t // 8] * q[t % 8] * w[n] * int(halves[t, n]) for t in range(rows) for n in range(columns))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_it_is_the_formula(device, dtype):
    for rows in (1, 8, 21):
        x = (message(40)[:rows, :9].nan_to_num() * 50).to(dtype)
        assert keyed(x.to(device)) == by_hand(x, SEED) != by_hand(x, SEED + 1)


def test_a_dimension_of_one_may_have_any_stride(device):
    """As an image of one channel, whose channels come last."""
    image = torch.randn(1, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    x = image.movedim(1, -1).reshape(24, 1)
    assert x.stride(-1) != 1 and x.is_contiguous()
    assert keyed(x.to(device)) == keyed(x.clone().view(24, 1).to(device)) == by_hand(image.view(24, 1), SEED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 300), (70, 1024), (1, 5), (100, 1)])
def test_a_message_is_read_to_the_same_digest_along_with_its_statistics(device, dtype, shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = math.nan
    sums, scalars = torch.empty(shape[1], device=device), torch.empty(3, device=device)
    digest, out = torch.empty(2, dtype=torch.int32, device=device), torch.empty(1, dtype=torch.int64, device=device)
    message_statistics(x.to(device), sums, scalars, digest, None, key(device=device), out)
    assert int(out) == int(keyed_digest_reference(x, key()))
    plain = torch.empty_like(digest)
    message_statistics(x.to(device), sums, scalars, plain)
    assert torch.equal(plain, digest), "the public one is the same with a key and without"


def test_large_messages_are_taken_in_blocks():
    x = message(2100, 300)
    first = (torch.arange(2100) < 1111)[:, None]
    parts = [reference(torch.where(rows, x, 0.0)) for rows in (first, ~first)]
    assert (sum(parts) - reference(x)) % 2**64 == 0


def test_many_messages_at_once():
    xs = torch.stack([message(21, 9), message(21, 9) * 2])
    assert keyed_digest_reference(xs, key()).tolist() == [reference(x) for x in xs]


KINDS = ("mask", "bytes", "positions", "doubles", "one element")


@pytest.mark.parametrize("name", some(KINDS, ("mask", "one element")))
def test_tensors_of_any_kind_have_one(device, name):
    generator = torch.Generator().manual_seed(0)
    x = {
        "mask": torch.rand(2, 1, 70, 70, generator=generator) < 0.5,
        "bytes": torch.randint(0, 255, (3, 37), generator=generator).to(torch.uint8),
        "positions": torch.arange(4096).view(2, -1),
        "doubles": torch.randn(5, 7, generator=generator, dtype=torch.float64),
        "one element": torch.tensor(-3.5),
    }[name]
    changed = x.clone().flatten()
    changed[0] = ~changed[0] if x.dtype == torch.bool else changed[0] + 1
    digests = [keyed(one.to(device)) for one in (x, changed.view(x.shape))]
    assert digests[0] != digests[1]
    assert keyed(x.to(device), seed=3) != digests[0]


def test_a_collision_of_the_public_digest_is_none_of_the_keyed_one(device):
    """Bits 15 and 31 of two elements turned over: made up by hand, as a sender that reads this code can."""
    x = message().to(device)
    forged = bits_turned(x, 1 << 31 | 1 << 15, (3, 7), (20, 11))
    assert not torch.equal(x.nan_to_num(), forged.nan_to_num())
    assert torch.equal(tensor_digest(x), tensor_digest(forged)), "the public weights no longer allow it: find another"
    assert keyed(x) != keyed(forged)
    turned = bits_turned(x, 1 << 31 | 1 << 15, *[(row, column) for row in range(36) for column in range(300)])
    assert torch.equal(tensor_digest(x), tensor_digest(turned)), "nor is a whole message with other signs seen"
    assert keyed(x) != keyed(turned)


def test_what_changes_nothing_but_highest_bits_shows_under_every_key():
    """The difference that sums modulo a power of two are blind to, in one element and in all, under many keys."""
    x = message(16, 24)
    for bits in (1 << 31, 1 << 31 | 1 << 15):
        for places in ([(2, 3), (2, 4)], [(row, column) for row in range(16) for column in range(24)]):
            forged = bits_turned(x, bits, *places)
            assert all(reference(x, seed) != reference(forged, seed) for seed in range(1, 100))


def test_digests_of_two_keys_have_nothing_in_common():
    """Over many keys the difference of two given messages takes every value of its highest bits about as often."""
    x, forged = message(8, 6), bits_turned(message(8, 6), 1, (3, 2))
    both = torch.stack([x, forged])
    digests = [keyed_digest_reference(both, key(seed)).tolist() for seed in range(1000)]
    differences = [(one - other) % 2**64 >> 60 for one, other in digests]
    counts = np.bincount(differences, minlength=16)
    assert counts.min() > 30 and counts.max() < 100  # 62 +- 8


def test_a_key_and_a_place_belong_together():
    with pytest.raises(ValueError, match="belong together"):
        tensor_digest(message(), key())
    with pytest.raises(ValueError, match=r"keyed_1 must be int64 \[1\]"):
        tensor_digest(message(), key(), torch.empty(2, dtype=torch.int64))
