"""Transfer and prediction statistics of one stage: what entered it and what left it, on sketches of the same tokens.

With e_t, l_t the sketches of token t entering and leaving and |.| the full norms of those tokens:

    cosine       = mean_t <e_t, l_t> / sqrt(<e_t, e_t> <l_t, l_t>)
    gain         = mean_t log(|l_t| / |e_t|)

The cosine is that of the sketches: its error then shrinks with the angle, as Fisher's transformation takes for
granted, where full norms under a sketched product would leave an error of an eighth near a cosine of one.

A few tokens are often far longer than all others (massive activations, Sun et al. 2024), and would be all that sums
over tokens tell of. So everything else is of E and L with both rows of a token shrunk by its Huber weight

    h_t          = min(1, 2 <e> / |e_t|, 2 <l> / |l_t|),    <x> = (mean_t |x_t|^(1/4))^4

which lets no token be longer than twice a typical one:

    step         = ||L - E||_F / ||E||_F
    cross_k      = mean_t e_tk l_tk / sqrt(mean_t e_tk^2 mean_t l_tk^2)
    cka          = ||Ec^T Lc||_F^2 / (||Ec^T Ec||_F ||Lc^T Lc||_F)      c: minus each dimension's mean over the tokens

and with P = Ec W the change that a linear map W learnt before predicts, and Dc = Lc - Ec the actual change:

    correlation  = <P, Dc> / (||P|| ||Dc||)
    slope        = <P, Dc> / <P, P>
    A, B         = Ec^T Ec / m, Ec^T Dc / m             the normal equations from which W is learnt

For finite input everything is finite but for correlation and slope where nothing is predicted (P = 0, as with W = 0
or a message of one token): these are NaN, not available. In cross and cka a side without variation gives zero; a norm
below float32's smallest normal number counts as that number. E and L are scaled by their largest magnitudes first, so
that no square overflows and none that matters underflows; when these differ by more than 2^50 their ratio counts as
2^50. In cosine a sketch shorter than 2^-63 of the largest magnitude counts as that long, so a token without length
gives zero. A and B beyond float32's range become its largest.

Linear CKA: Kornblith et al. 2019. The rest is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from deepspeed_sentinel.kernels.dispatch import LAUNCH, check_output, runs_on_triton
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS, TOKENS
from deepspeed_sentinel.kernels.transfer_kernel import SHAPE, WARPS, transfer_kernel

TRANSFER = ("cosine", "gain", "step", "cka", "correlation", "slope")
_TINY, _LARGEST, _RATIO, _SHORT = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max, 2.0**50, 2.0**-63


class TransferStatistics(NamedTuple):
    """Of M messages.

    Attributes:
        scalars_M6: float32, in the order of ``TRANSFER``.
        cross_MK: float32, the cross moments.
        a_MKK, b_MKK: float32, the normal equations.
    """

    scalars_M6: torch.Tensor
    cross_MK: torch.Tensor
    a_MKK: torch.Tensor
    b_MKK: torch.Tensor


def transfer_statistics(
    entering_MmK: torch.Tensor,
    leaving_MmK: torch.Tensor,
    entering_norms_Mm: torch.Tensor,
    leaving_norms_Mm: torch.Tensor,
    w_XKK: torch.Tensor,
) -> TransferStatistics:
    """All statistics of M messages that passed one stage, in one launch.

    Args:
        entering_MmK, leaving_MmK: float32, finite, sketches with the same sample and projection; any strides.
        entering_norms_Mm, leaving_norms_Mm: float32, finite, full norms of those tokens.
        w_XKK: float32, the map that predicts the change, [K, K] for all messages or [M, K, K]; zeros when there is
            none yet.

    Raises:
        ValueError: an argument has another shape, dtype or device.
    """
    shape = tuple(entering_MmK.shape)
    if len(shape) != 3 or not 1 <= shape[1] <= TOKENS or shape[2] != DIMENSIONS:
        raise ValueError(f"entering_MmK must be [M, 1 to {TOKENS} tokens, {DIMENSIONS}], got {list(shape)}")
    check_output("entering_MmK", entering_MmK, torch.float32, shape, entering_MmK)
    check_output("leaving_MmK", leaving_MmK, torch.float32, shape, entering_MmK)
    check_output("entering_norms_Mm", entering_norms_Mm, torch.float32, shape[:2], entering_MmK)
    check_output("leaving_norms_Mm", leaving_norms_Mm, torch.float32, shape[:2], entering_MmK)
    maps = shape[:1] if w_XKK.dim() > 2 else ()
    check_output("w_XKK", w_XKK, torch.float32, (*maps, DIMENSIONS, DIMENSIONS), entering_MmK)
    if not runs_on_triton(entering_MmK):
        return transfer_statistics_reference(entering_MmK, leaving_MmK, entering_norms_Mm, leaving_norms_Mm, w_XKK)
    messages, tokens, dimensions = shape
    out = TransferStatistics(
        *(
            torch.empty(messages, *sizes, dtype=torch.float32, device=entering_MmK.device)
            for sizes in ((len(TRANSFER),), (dimensions,), (dimensions, dimensions), (dimensions, dimensions))
        )
    )
    w_MKK = w_XKK.contiguous().expand(messages, -1, -1)
    transfer_kernel[(messages,)](
        entering_MmK,
        leaving_MmK,
        entering_norms_Mm,
        leaving_norms_Mm,
        w_MKK,
        *out,
        tokens,
        *entering_MmK.stride(),
        *leaving_MmK.stride(),
        *entering_norms_Mm.stride(),
        *leaving_norms_Mm.stride(),
        w_MKK.stride(0),
        num_warps=WARPS,
        **SHAPE,
        **LAUNCH,
    )
    return out


def transfer_statistics_reference(
    entering_XmK: torch.Tensor,
    leaving_XmK: torch.Tensor,
    entering_norms_Xm: torch.Tensor,
    leaving_norms_Xm: torch.Tensor,
    w_XKK: torch.Tensor,
) -> TransferStatistics:
    """The definition, for sketches [..., m, K]; W is [K, K] or has the leading dimensions too."""
    scale_e_X11 = entering_XmK.abs().amax((-2, -1), keepdim=True)
    scale_l_X11 = leaving_XmK.abs().amax((-2, -1), keepdim=True)
    both_X11 = torch.maximum(scale_e_X11, scale_l_X11)
    both_X11 = torch.where(both_X11 > 0, both_X11, 1.0)
    scale_e_X11 = torch.where(scale_e_X11 > 0, scale_e_X11, both_X11)
    scale_l_X11 = torch.where(scale_l_X11 > 0, scale_l_X11, both_X11)
    ratio_X11 = (scale_l_X11 / scale_e_X11).clamp_max(_RATIO)
    e_XmK, l_XmK = entering_XmK / scale_e_X11, leaving_XmK / scale_l_X11
    tokens = e_XmK.shape[-2]

    length_e_Xm, length_l_Xm = entering_norms_Xm.clamp_min(_TINY), leaving_norms_Xm.clamp_min(_TINY)
    norms_e_Xm, norms_l_Xm = (torch.linalg.vector_norm(x_XmK, dim=-1).clamp_min(_SHORT) for x_XmK in (e_XmK, l_XmK))
    cosine_Xm = (e_XmK * l_XmK).sum(-1) / norms_e_Xm / norms_l_Xm
    gain_X = (length_l_Xm.log() - length_e_Xm.log()).mean(-1)

    huber_Xm1 = huber_weights(length_e_Xm, length_l_Xm)[..., None]
    e_XmK, l_XmK = e_XmK * huber_Xm1, l_XmK * huber_Xm1
    change_XmK = l_XmK * ratio_X11 - e_XmK
    step_X = _norm(change_XmK) / _norm(e_XmK).clamp_min(_TINY)

    moments_e_XK, moments_l_XK = e_XmK.square().mean(-2), l_XmK.square().mean(-2)
    cross_XK = (e_XmK * l_XmK).mean(-2) / (moments_e_XK.sqrt() * moments_l_XK.sqrt()).clamp_min(_TINY)

    ec_XmK, lc_XmK, dc_XmK = (
        values_XmK - values_XmK.mean(-2, keepdim=True) for values_XmK in (e_XmK, l_XmK, change_XmK)
    )
    gram_e_XKK, gram_l_XKK, gram_el_XKK, gram_ed_XKK = (
        left_XmK.transpose(-1, -2) @ right_XmK / tokens
        for left_XmK, right_XmK in ((ec_XmK, ec_XmK), (lc_XmK, lc_XmK), (ec_XmK, lc_XmK), (ec_XmK, dc_XmK))
    )
    cka_X = _norm(gram_el_XKK) ** 2 / (_norm(gram_e_XKK) * _norm(gram_l_XKK)).clamp_min(_TINY)

    along_X = (w_XKK * gram_ed_XKK).sum((-2, -1))
    predicted_X = (w_XKK * (gram_e_XKK @ w_XKK)).sum((-2, -1)).clamp_min(0.0)
    actual_X = dc_XmK.square().mean(-2).sum(-1)
    correlation_X = along_X / (predicted_X.sqrt() * actual_X.sqrt()).clamp_min(_TINY)
    slope_X = along_X / predicted_X.clamp_min(_TINY)
    available_X = predicted_X > 0
    scalars_X6 = torch.stack(
        [
            cosine_Xm.mean(-1),
            gain_X,
            step_X.clamp_max(_LARGEST),
            cka_X,
            torch.where(available_X, correlation_X, torch.nan),
            torch.where(available_X, slope_X.clamp(-_LARGEST, _LARGEST), torch.nan),
        ],
        dim=-1,
    )
    a_XKK, b_XKK = (
        (gram_XKK * scale_e_X11 * scale_e_X11).clamp(-_LARGEST, _LARGEST) for gram_XKK in (gram_e_XKK, gram_ed_XKK)
    )
    return TransferStatistics(scalars_X6, cross_XK, a_XKK, b_XKK)


def huber_weights(length_e_Xm: torch.Tensor, length_l_Xm: torch.Tensor) -> torch.Tensor:
    """float [..., m], at most 1: what shrinks both rows of a token. Lengths are normal numbers above zero."""
    entering_Xm, leaving_Xm = (
        2.0 * length_Xm.sqrt().sqrt().mean(-1, keepdim=True) ** 4 / length_Xm
        for length_Xm in (length_e_Xm, length_l_Xm)
    )
    return torch.minimum(entering_Xm, leaving_Xm).clamp_max(1.0)


def _norm(matrix_XRC: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(matrix_XRC, dim=(-2, -1))
