"""One pass over a message X[T, D]: column sums, energy, largest magnitude, non-finite count, digest.

With F the finite part of X (non-finite elements replaced by zero):

    column_sums_d = sum_t F_td            energy = sum_td F_td^2
    max_abs       = max_td |F_td|         non_finite = number of NaN and infinite elements
    digest        = V B W  (mod 2^32)     B: the bits of X as integers, V [2, T] and W [D] fixed odd weights

The digest is a sum modulo 2^32, so its bits depend on neither the order of the additions nor the device. Equal
digests at both ends of a link mean equal messages, bit for bit, up to a chance of about 2^-64.

Statistics after arXiv 2603.03592; the digest is ours.
"""

from __future__ import annotations

from functools import lru_cache

import torch

_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
DIGEST_WORDS = 2
SCALARS = ("energy", "max_abs", "non_finite")


def message_statistics(
    x_TD: torch.Tensor, column_sums_D: torch.Tensor, scalars_3: torch.Tensor, digest_2: torch.Tensor
) -> None:
    """Write the statistics of one message into rows of the step's buffers.

    Args:
        x_TD: floating-point message, T tokens by D hidden, any strides; not changed.
        column_sums_D: float32 [D], out.
        scalars_3: float32 [3], out: energy, max_abs, non_finite.
        digest_2: int32 [2], out.

    Raises:
        ValueError: ``x_TD`` is not two-dimensional floating point, or an output does not fit it.
    """
    if x_TD.dim() != 2 or not x_TD.is_floating_point():
        raise ValueError(f"x_TD must be a floating-point [T, D] tensor, got {x_TD.dtype} {tuple(x_TD.shape)}")
    for name, out, size in (("column_sums_D", column_sums_D, x_TD.shape[1]), ("scalars_3", scalars_3, 3)):
        if out.dtype != torch.float32 or tuple(out.shape) != (size,):
            raise ValueError(f"{name} must be float32 [{size}], got {out.dtype} {tuple(out.shape)}")
    values_TD = x_TD.detach()
    digest_2.copy_(tensor_digest(values_TD))
    values_TD = values_TD.float() if values_TD.dtype != torch.float64 else values_TD
    low, high = torch.aminmax(values_TD)  # NaN and infinities show in the extremes
    non_finite = torch.zeros(())
    # On a CPU looking at a value costs nothing; elsewhere it would wait for the device.
    if values_TD.device.type != "cpu" or not torch.isfinite(high - low):
        finite_TD = torch.isfinite(values_TD)
        non_finite = torch.count_nonzero(~finite_TD)
        values_TD = torch.where(finite_TD, values_TD, 0)
        low, high = torch.aminmax(values_TD)
    torch.sum(values_TD, 0, dtype=torch.float32, out=column_sums_D)
    flat = values_TD.reshape(-1)
    scalars_3[0] = torch.dot(flat, flat)
    scalars_3[1] = torch.maximum(-low, high)
    scalars_3[2] = non_finite


def tensor_digest(x: torch.Tensor) -> torch.Tensor:
    """The digest of a tensor of any dtype and shape, int32 [2]; see the head of this file."""
    x = x.detach().to(torch.uint8) if x.dtype == torch.bool else x.detach()
    x_RC = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1)
    bits_RC = x_RC.contiguous().view(_INTEGER_VIEW[x.element_size()]).to(torch.int32)
    rows, columns = bits_RC.shape
    weights_2R, weights_C = _weights(rows, columns, bits_RC.device)
    if bits_RC.device.type == "cpu":
        return (weights_2R @ bits_RC * weights_C).sum(1, dtype=torch.int32)
    per_row_2 = [(weights_R[:, None] * bits_RC * weights_C).sum(dtype=torch.int32) for weights_R in weights_2R]
    return torch.stack(per_row_2)


@lru_cache(maxsize=64)
def _weights(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    weights_2R = torch.stack([_odd_hash(rows, 1), _odd_hash(rows, 2)])
    return weights_2R.to(device), _odd_hash(columns, 3).to(device)


def _odd_hash(count: int, stream: int) -> torch.Tensor:
    """Odd int32 weights from a counter (the finaliser of MurmurHash3); odd, so that no single bit is lost."""
    h = torch.arange(count, dtype=torch.int64) + (stream << 32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13) ^ (stream * 0x9E3779B9)) * 0xC2B2AE35 & 0xFFFFFFFF
    h = (h ^ (h >> 16)) | 1
    return torch.where(h >= 1 << 31, h - (1 << 32), h).to(torch.int32)
