"""A counter-based integer hash, the same bits in torch and in a kernel: weights, signs and samples come from it.

    mix(h):  h ^= h >> 16;  h *= 0x7FEB352D;  h ^= h >> 15;  h *= 0x846CA68B;  h ^= h >> 16        (mod 2^32)
    hash(seed, counter) = mix(mix(counter ^ key0) ^ key1)
    key0 = mix(low(seed) ^ stream),  key1 = mix(mix(high(seed) ^ stream) + key0)       (halves of a 64-bit seed)

``mix`` is the bijection "lowbias32" of https://github.com/skeeto/hash-prospector (public domain). Streams keep
different uses of one seed apart. It spreads bits well; it is no cipher: a seed is a secret as long as nothing
computed from it is published before the step is over.
"""

from __future__ import annotations

import torch

from deepspeed_sentinel.kernels.dispatch import tl, triton

_MASK = 0xFFFFFFFF
SAMPLE_STREAM, SIGN_STREAM = 0x9E3779B9, 0x3C6EF372


def mix_reference(h: torch.Tensor) -> torch.Tensor:
    """int64 tensor of 32-bit values -> the same shape, mixed."""
    h = (h ^ (h >> 16)) * 0x7FEB352D & _MASK  # a product that wraps beyond 64 bits keeps its low 32
    h = (h ^ (h >> 15)) * 0x846CA68B & _MASK
    return h ^ (h >> 16)


def hash_reference(seeds_X: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """int64 seeds [...] -> int64 [..., count]: 32-bit hashes of the counters 0 to count - 1."""
    key0_X1 = mix_reference((seeds_X & _MASK) ^ stream)[..., None]
    key1_X1 = mix_reference(mix_reference((seeds_X >> 32 & _MASK) ^ stream)[..., None] + key0_X1 & _MASK)
    counters = torch.arange(count, dtype=torch.int64, device=seeds_X.device)
    return mix_reference(mix_reference(counters ^ key0_X1) ^ key1_X1)


@triton.jit
def float_of_bits(bits, KIND: tl.constexpr):
    """int16 or int32 bits of a "bf16", "fp16" or "fp32" number as float32."""
    if KIND == "bf16":
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == "fp16":
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def seed_keys(seed, stream: tl.constexpr):
    key0 = mix(seed.to(tl.uint32) ^ stream)
    return key0, mix(mix((seed >> 32).to(tl.uint32) ^ stream) + key0)


@triton.jit
def hash_counters(counters, key0, key1):
    return mix(mix(tl.cast(counters, tl.uint32) ^ key0) ^ key1)
