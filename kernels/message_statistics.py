"""One pass over a message X[T, D]: column sums, energy, largest magnitude, non-finite count, digest.

With F the finite part of X (non-finite elements replaced by zero):

    column_sums_d = sum_t F_td            energy = sum_td F_td^2
    max_abs       = max_td |F_td|         non_finite = number of NaN and infinite elements
    digest_j      = sum_td V_jt B_td W_jd  (mod 2^32)      j = 0, 1;  B: the bits of X as integers
    V_jt          = P_j(t div 8) Q_j(t mod 8);             P, Q, W: fixed odd weights

The digest is a sum modulo 2^32, so its bits depend on neither the order of the additions nor the device, and since
the weights are odd no single changed bit is lost. Equal digests at both ends of a link mean equal messages, bit for
bit, up to a chance of about 2^-64.

Statistics after arXiv 2603.03592; the digest is ours.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from deepspeed_sentinel.kernels.dispatch import check_output
from deepspeed_sentinel.kernels.hashing import mix_reference

_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
DIGEST_WORDS = 2
SCALARS = ("energy", "max_abs", "non_finite")
GROUP = 8  # rows that share one weight P
_COLUMNS, _GROUPS, _ROWS = 0x9E3779B9, 0x3C6EF372, 0xDAA66D2B  # counters of the three kinds of weights start here


def message_statistics(
    x_TD: torch.Tensor,
    column_sums_D: torch.Tensor,
    scalars_3: torch.Tensor,
    digest_2: torch.Tensor,
    copy_TD: torch.Tensor | None = None,
) -> None:
    """Write the statistics of one message into rows of the step's buffers.

    Args:
        x_TD: floating-point message, T tokens by D hidden, any strides; not changed.
        column_sums_D: float32 [D], out.
        scalars_3: float32 [3], out: energy, max_abs, non_finite.
        digest_2: int32 [2], out.
        copy_TD: optional, like ``x_TD``, out: its copy, made while it is read.

    Raises:
        ValueError: ``x_TD`` is not two-dimensional floating point, or an output does not fit it.
    """
    if x_TD.dim() != 2 or not x_TD.is_floating_point():
        raise ValueError(f"x_TD must be a floating-point [T, D] tensor, got {x_TD.dtype} {list(x_TD.shape)}")
    check_output("column_sums_D", column_sums_D, torch.float32, (x_TD.shape[1],), x_TD)
    check_output("scalars_3", scalars_3, torch.float32, (3,), x_TD)
    check_output("digest_2", digest_2, torch.int32, (DIGEST_WORDS,), x_TD)
    if copy_TD is not None:
        check_output("copy_TD", copy_TD, x_TD.dtype, tuple(x_TD.shape), x_TD)
    for out, value in zip(
        (column_sums_D, scalars_3, digest_2), message_statistics_reference(x_TD.detach()), strict=True
    ):
        out.copy_(value)
    if copy_TD is not None:
        copy_TD.copy_(x_TD)


def message_statistics_reference(x_XTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, for one message [T, D] or many [..., T, D] at once.

    Returns:
        column sums float32 [..., D], scalars float32 [..., 3] in the order of ``SCALARS``, digest int32 [..., 2].
    """
    digest_X2 = _digest(x_XTD)
    values_XTD = x_XTD if x_XTD.dtype == torch.float64 else x_XTD.float()
    low_X, high_X = _extremes(values_XTD)
    non_finite_X = torch.zeros_like(low_X)
    # NaN and infinities show in the extremes. On a CPU looking at a value costs nothing; elsewhere it would wait.
    if values_XTD.device.type != "cpu" or not bool(torch.isfinite(high_X - low_X).all()):
        finite_XTD = torch.isfinite(values_XTD)
        non_finite_X = torch.count_nonzero(~finite_XTD, dim=(-2, -1))
        values_XTD = torch.where(finite_XTD, values_XTD, 0)
        low_X, high_X = _extremes(values_XTD)
    sums_XD = values_XTD.sum(-2)
    flat_XE = values_XTD.flatten(-2)
    energy_X = (flat_XE[..., None, :] @ flat_XE[..., None])[..., 0, 0]
    scalars_X3 = torch.stack([energy_X, torch.maximum(-low_X, high_X), non_finite_X], dim=-1)
    return sums_XD.float(), scalars_X3.float(), digest_X2


def tensor_digest(x: torch.Tensor) -> torch.Tensor:
    """The digest of a tensor of any dtype and shape, int32 [2]; see the head of this file."""
    x = x.detach().to(torch.uint8) if x.dtype == torch.bool else x.detach()
    return _digest(x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1))


def _extremes(values_XTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if values_XTD.shape[-2] * values_XTD.shape[-1] == 0:
        zeros_X = values_XTD.new_zeros(values_XTD.shape[:-2])
        return zeros_X, zeros_X
    if values_XTD.dim() == 2:
        low, high = torch.aminmax(values_XTD)
    else:
        low, high = torch.aminmax(values_XTD.flatten(-2), dim=-1)
    return low, high


def _digest(x_XRC: torch.Tensor) -> torch.Tensor:
    bits_XRC = x_XRC.contiguous().view(_INTEGER_VIEW[x_XRC.element_size()]).to(torch.int32)
    rows, columns = bits_XRC.shape[-2:]
    row_weights_2R, column_weights_2C = digest_weights(rows, columns, bits_XRC.device)
    if bits_XRC.device.type == "cpu":
        by_column_X2C = row_weights_2R @ bits_XRC
    else:  # there is no integer matrix product on a GPU
        by_column_X2C = torch.stack(
            [(bits_XRC * weights_R[:, None]).sum(-2, dtype=torch.int32) for weights_R in row_weights_2R], dim=-2
        )
    return (by_column_X2C * column_weights_2C).sum(-1, dtype=torch.int32)


@lru_cache(maxsize=64)
def digest_weights(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights V int32 [2, rows] and W int32 [2, columns]."""
    group_2G, row_2R = _odd_pair(-(-rows // GROUP), _GROUPS), _odd_pair(GROUP, _ROWS)
    row_weights_2R = (group_2G[:, :, None] * row_2R[:, None, :]).flatten(1)[:, :rows]
    weights = (_signed(row_weights_2R & 0xFFFFFFFF), _signed(_odd_pair(columns, _COLUMNS)))
    return weights[0].contiguous().to(device), weights[1].to(device)


def _odd_pair(count: int, start: int) -> torch.Tensor:
    """int64 [2, count]: two odd 32-bit weights a counter, the second derived from the first one's hash."""
    h = mix_reference(torch.arange(count, dtype=torch.int64) + start & 0xFFFFFFFF)
    return torch.stack([h, (h ^ (h >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF]) | 1


def _signed(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
