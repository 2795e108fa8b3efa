"""One pass over a message X[T, D]: column sums, energy, largest magnitude, non-finite count, digest.

With F the finite part of X (non-finite elements replaced by zero):

    column_sums_d = sum_t F_td            energy = sum_td F_td^2
    max_abs       = max_td |F_td|         non_finite = number of NaN and infinite elements
    digest        = of the bits of X, see ``tensor_digest``; under a key, see ``keyed_digest``

How it is done on a GPU: see ``message_stream``.

Rounding: a sum of float32 additions is off by at most depth * 2^-24 of the sum of magnitudes, where depth is the
longest chain of additions (Higham 2002): on a GPU about 45 + tokens a group / 8, on a CPU at most their number.
A sum beyond float32's range is infinite, or undefined where partial sums of both signs are.

Statistics after arXiv 2603.03592.
"""

from __future__ import annotations

import torch

from deepspeed_sentinel.kernels.dispatch import LAUNCH, check_contiguous, check_output, runs_on_triton, tl, triton
from deepspeed_sentinel.kernels.keyed_digest import GROUP, DigestKey, check_keyed, keyed_digest_reference
from deepspeed_sentinel.kernels.message_stream import REDUCED, launch_stream, plan_stream, reduce_partials
from deepspeed_sentinel.kernels.tensor_digest import DIGEST_WORDS, INTEGER_VIEW, digest_weights, weighted_sum

SCALARS = ("energy", "max_abs", "non_finite")
_BLOCK = 1 << 18  # elements that the reference takes at once on a CPU


def message_statistics(
    x_TD: torch.Tensor,
    column_sums_D: torch.Tensor,
    scalars_3: torch.Tensor,
    digest_2: torch.Tensor,
    copy_TD: torch.Tensor | None = None,
    key: DigestKey | None = None,
    keyed_1: torch.Tensor | None = None,
) -> None:
    """Write the statistics of one message into rows of the step's buffers.

    Args:
        x_TD: floating-point message, T tokens by D hidden, any strides; not changed.
        column_sums_D: float32 [D], out.
        scalars_3: float32 [3], out: energy, max_abs, non_finite.
        digest_2: int32 [2], out.
        copy_TD: optional, like ``x_TD``, out: its copy, made while it is read.
        key: optional, of the keyed digest.
        keyed_1: int64 [1], out: the digest under the key, if there is one.

    Raises:
        ValueError: ``x_TD`` is not two-dimensional floating point, or an output does not fit it.
    """
    check_statistics(x_TD, column_sums_D, scalars_3, digest_2, copy_TD)
    check_keyed(x_TD, key, keyed_1)
    if runs_on_triton(x_TD):
        plan = plan_stream(x_TD)
        launch_stream(x_TD, plan, copy_TD, key)
        _reduce_kernel[(plan.reducers,)](
            plan.floats,
            plan.words,
            column_sums_D,
            scalars_3,
            digest_2,
            keyed_1,
            plan.hidden,
            plan.groups,
            plan.programs,
            KEYED=key is not None,
            BLOCK=REDUCED,
            num_warps=4,
            **LAUNCH,
        )
        return
    for out, value in zip(
        (column_sums_D, scalars_3, digest_2), message_statistics_reference(x_TD.detach()), strict=True
    ):
        out.copy_(value)
    if key is not None and keyed_1 is not None:
        keyed_1.copy_(keyed_digest_reference(x_TD.detach(), key))
    if copy_TD is not None:
        copy_TD.copy_(x_TD)


def check_statistics(
    x_TD: torch.Tensor,
    column_sums_D: torch.Tensor,
    scalars_3: torch.Tensor,
    digest_2: torch.Tensor,
    copy_TD: torch.Tensor | None,
) -> None:
    if x_TD.dim() != 2 or not x_TD.is_floating_point():
        raise ValueError(f"x_TD must be a floating-point [T, D] tensor, got {x_TD.dtype} {list(x_TD.shape)}")
    check_output("column_sums_D", column_sums_D, torch.float32, (x_TD.shape[1],), x_TD)
    check_output("scalars_3", scalars_3, torch.float32, (3,), x_TD)
    check_output("digest_2", digest_2, torch.int32, (DIGEST_WORDS,), x_TD)
    check_contiguous(column_sums_D=column_sums_D, scalars_3=scalars_3, digest_2=digest_2)
    if copy_TD is not None:
        check_output("copy_TD", copy_TD, x_TD.dtype, tuple(x_TD.shape), x_TD)


@triton.jit(
    do_not_specialize=["groups", "programs"],
    do_not_specialize_on_alignment=["sums_ptr", "scalars_ptr", "digest_ptr", "keyed_ptr"],
)  # rows of buffers: any alignment
def _reduce_kernel(
    floats_ptr,
    words_ptr,
    sums_ptr,
    scalars_ptr,
    digest_ptr,
    keyed_ptr,
    hidden,
    groups,
    programs,
    KEYED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    reduce_partials(
        tl.program_id(0),
        floats_ptr,
        words_ptr,
        sums_ptr,
        scalars_ptr,
        digest_ptr,
        keyed_ptr,
        hidden,
        groups,
        programs,
        KEYED,
        BLOCK,
    )


def message_statistics_reference(x_XTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, for one message [T, D] or many [..., T, D] at once.

    Returns:
        column sums float32 [..., D], scalars float32 [..., 3] in the order of ``SCALARS``, digest int32 [..., 2].
    """
    if x_XTD.dim() == 2 and x_XTD.device.type == "cpu" and x_XTD.numel() > _BLOCK:
        return _by_blocks(x_XTD)
    bits_XTC, values_XTD = _bits_and_values(x_XTD)
    digest_X2 = weighted_sum(bits_XTC, *digest_weights(*bits_XTC.shape[-2:], x_XTD.device))
    return *_sums_and_scalars(values_XTD), digest_X2


def _by_blocks(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for one message on a CPU, in blocks of tokens whose intermediate values stay in its cache."""
    tokens, hidden = x_TD.shape
    rows = max(GROUP, _BLOCK // hidden)
    parts = []
    for first in range(0, tokens, rows):
        bits_RC, values_RD = _bits_and_values(x_TD[first : first + rows])
        row_weights_2T, column_weights_2C = digest_weights(tokens, bits_RC.shape[1], x_TD.device)
        digest_2 = weighted_sum(bits_RC, row_weights_2T[:, first : first + rows], column_weights_2C)
        parts.append((*_sums_and_scalars(values_RD), digest_2))
    sums_BD, scalars_B3, digest_B2 = (torch.stack(part) for part in zip(*parts, strict=True))
    energy, max_abs, non_finite = scalars_B3.unbind(1)
    scalars_3 = torch.stack([energy.sum(), max_abs.max(), non_finite.sum(dtype=torch.float64).float()])
    return sums_BD.sum(0), scalars_3, digest_B2.sum(0, dtype=torch.int32)


def _bits_and_values(x_XTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [..., T, C], C = D but for float64, and the same numbers in float32 or float64."""
    bits_XTC = x_XTD.contiguous().view(INTEGER_VIEW[x_XTD.element_size()]).to(torch.int32)
    return bits_XTC, x_XTD if x_XTD.dtype == torch.float64 else x_XTD.float()


def _sums_and_scalars(values_XTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low_X, high_X = _extremes(values_XTD)
    non_finite_X = torch.zeros_like(low_X)
    # NaN and infinities show in the extremes. On a CPU looking at a value costs nothing; elsewhere it would wait.
    if values_XTD.device.type != "cpu" or not bool(torch.isfinite(high_X - low_X).all()):
        finite_XTD = torch.isfinite(values_XTD)
        non_finite_X = torch.count_nonzero(~finite_XTD, dim=(-2, -1))
        values_XTD = torch.where(finite_XTD, values_XTD, 0)
        low_X, high_X = _extremes(values_XTD)
    sums_XD = values_XTD.new_ones(values_XTD.shape[-2]) @ values_XTD  # three times as fast as sum(-2) on a CPU
    flat_XE = values_XTD.flatten(-2)
    energy_X = torch.dot(flat_XE, flat_XE) if flat_XE.dim() == 1 else torch.linalg.vecdot(flat_XE, flat_XE)
    scalars_X3 = torch.stack([energy_X, torch.maximum(-low_X, high_X), non_finite_X], dim=-1)
    return sums_XD.float(), scalars_X3.float() + 0.0  # + 0.0: a largest magnitude of -0.0 is 0.0


def _extremes(values_XTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if values_XTD.shape[-2] * values_XTD.shape[-1] == 0:
        zeros_X = values_XTD.new_zeros(values_XTD.shape[:-2])
        return zeros_X, zeros_X
    if values_XTD.dim() == 2:
        low, high = torch.aminmax(values_XTD)
    else:
        low, high = torch.aminmax(values_XTD.flatten(-2), dim=-1)
    return low, high
