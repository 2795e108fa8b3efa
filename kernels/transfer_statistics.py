"""Transfer and prediction statistics of one stage: what entered it and what left it, on sketches of the same tokens.

With e_t, l_t the sketches of token t entering and leaving and |.| the full norms of those tokens:

    cosine       = mean_t <e_t, l_t> / (|e_t| |l_t|)
    gain         = mean_t log(|l_t| / |e_t|)

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
or a message of one token): these are NaN, not available. In cosine a token without length counts as zero; in cross
and cka a side without variation gives zero; a norm below float32's smallest normal number counts as that number, and
a cosine beyond 2^20, which takes norms that do not belong to the sketches, as 2^20. E and L are scaled by their
largest magnitudes first, so that no square overflows and none that matters underflows; when these differ by more than
2^50 their ratio counts as 2^50. A and B beyond float32's range become its largest.

Linear CKA: Kornblith et al. 2019. The rest is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from deepspeed_sentinel.kernels.dispatch import LAUNCH, check_output, runs_on_triton, tl, triton
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS, TOKENS

TRANSFER = ("cosine", "gain", "step", "cka", "correlation", "slope")
SHAPE, WARPS = {"K": DIMENSIONS, "BT": 16}, 8
_TINY, _LARGEST, _RATIO, _COSINE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max, 2.0**50, 2.0**20


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
    w_KK: torch.Tensor,
) -> TransferStatistics:
    """All statistics of M messages that passed one stage, in one launch.

    Args:
        entering_MmK, leaving_MmK: float32, finite, sketches with the same sample and projection; any strides.
        entering_norms_Mm, leaving_norms_Mm: float32, finite, full norms of those tokens.
        w_KK: float32, the map that predicts the change; zeros when there is none yet.

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
    check_output("w_KK", w_KK, torch.float32, (DIMENSIONS, DIMENSIONS), entering_MmK)
    if not runs_on_triton(entering_MmK):
        return transfer_statistics_reference(entering_MmK, leaving_MmK, entering_norms_Mm, leaving_norms_Mm, w_KK)
    messages, tokens, dimensions = shape
    out = TransferStatistics(
        *(
            torch.empty(messages, *sizes, dtype=torch.float32, device=entering_MmK.device)
            for sizes in ((len(TRANSFER),), (dimensions,), (dimensions, dimensions), (dimensions, dimensions))
        )
    )
    _transfer_kernel[(messages,)](
        entering_MmK,
        leaving_MmK,
        entering_norms_Mm,
        leaving_norms_Mm,
        w_KK.contiguous(),
        *out,
        tokens,
        *entering_MmK.stride(),
        *leaving_MmK.stride(),
        *entering_norms_Mm.stride(),
        *leaving_norms_Mm.stride(),
        num_warps=WARPS,
        **SHAPE,
        **LAUNCH,
    )
    return out


@triton.jit
def _log(x):
    """Of positive normal numbers, from exactly rounded operations only: the same bits on every GPU."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = ((bits - 0x3F3504F3) >> 23).to(tl.float32)  # so that sqrt(1/2) <= fraction < sqrt(2)
    fraction = (bits - (((bits - 0x3F3504F3) >> 23) << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(fraction - 1.0, fraction + 1.0)
    z = s * s
    series = 2.0 + z * (0.6666666667 + z * (0.4 + z * (0.2857142857 + z * 0.2222222222)))
    return exponent * 0.6931471806 + s * series


@triton.jit
def _load_tokens(ptr, t, tokens, stride_m, stride_k, scale, K: tl.constexpr):
    k = tl.arange(0, K)
    places = t[:, None] * stride_m + k[None, :] * stride_k
    return tl.div_rn(tl.load(ptr + places, mask=(t < tokens)[:, None], other=0.0), scale)


@triton.jit
def _huber(e_norms_ptr, l_norms_ptr, t, tokens, en_m, ln_m, longest_e, longest_l):
    TINY: tl.constexpr = 1.1754943508222875e-38
    length_e = tl.maximum(tl.load(e_norms_ptr + t * en_m, mask=t < tokens, other=0.0), TINY)
    length_l = tl.maximum(tl.load(l_norms_ptr + t * ln_m, mask=t < tokens, other=0.0), TINY)
    weight = tl.minimum(tl.div_rn(longest_e, length_e), tl.div_rn(longest_l, length_l))
    return tl.minimum(weight, 1.0)


@triton.jit(do_not_specialize=["tokens"])
def _transfer_kernel(
    e_ptr,
    l_ptr,
    e_norms_ptr,
    l_norms_ptr,
    w_ptr,
    scalars_ptr,
    cross_ptr,
    a_ptr,
    b_ptr,
    tokens,
    e_M,
    e_m,
    e_k,
    l_M,
    l_m,
    l_k,
    en_M,
    en_m,
    ln_M,
    ln_m,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    """One message, three passes over its sketches: scales, means, everything else."""
    TINY: tl.constexpr = 1.1754943508222875e-38
    LARGEST: tl.constexpr = 3.4028234663852886e38
    RATIO: tl.constexpr = 2.0**50
    COSINE: tl.constexpr = 2.0**20
    message = tl.program_id(0).to(tl.int64)
    e_ptr += message * e_M
    l_ptr += message * l_M
    e_norms_ptr += message * en_M
    l_norms_ptr += message * ln_M
    block = tl.arange(0, BT)
    k = tl.arange(0, K)
    count = tl.cast(tokens, tl.float32)

    largest_e = tl.zeros([BT, K], tl.float32)
    largest_l = tl.zeros([BT, K], tl.float32)
    roots_e = tl.zeros([BT], tl.float32)
    roots_l = tl.zeros([BT], tl.float32)
    for first in range(0, tokens, BT):
        t = first + block
        length_e = tl.maximum(tl.load(e_norms_ptr + t * en_m, mask=t < tokens, other=0.0), TINY)
        length_l = tl.maximum(tl.load(l_norms_ptr + t * ln_m, mask=t < tokens, other=0.0), TINY)
        roots_e += tl.where(t < tokens, tl.sqrt_rn(tl.sqrt_rn(length_e)), 0.0)
        roots_l += tl.where(t < tokens, tl.sqrt_rn(tl.sqrt_rn(length_l)), 0.0)
        largest_e = tl.maximum(largest_e, tl.abs(_load_tokens(e_ptr, t, tokens, e_m, e_k, 1.0, K)))
        largest_l = tl.maximum(largest_l, tl.abs(_load_tokens(l_ptr, t, tokens, l_m, l_k, 1.0, K)))
    scale_e = tl.max(tl.max(largest_e, 1), 0)
    scale_l = tl.max(tl.max(largest_l, 1), 0)
    both = tl.maximum(scale_e, scale_l)
    both = tl.where(both > 0, both, 1.0)
    scale_e = tl.where(scale_e > 0, scale_e, both)
    scale_l = tl.where(scale_l > 0, scale_l, both)
    ratio = tl.minimum(tl.div_rn(scale_l, scale_e), RATIO)
    root_e = tl.div_rn(tl.sum(roots_e, 0), count)
    root_l = tl.div_rn(tl.sum(roots_l, 0), count)
    longest_e = 2.0 * root_e * root_e * root_e * root_e
    longest_l = 2.0 * root_l * root_l * root_l * root_l

    sum_e = tl.zeros([BT, K], tl.float32)
    sum_l = tl.zeros([BT, K], tl.float32)
    sum_d = tl.zeros([BT, K], tl.float32)
    for first in range(0, tokens, BT):
        t = first + block
        huber = _huber(e_norms_ptr, l_norms_ptr, t, tokens, en_m, ln_m, longest_e, longest_l)[:, None]
        e = _load_tokens(e_ptr, t, tokens, e_m, e_k, scale_e, K) * huber
        left = _load_tokens(l_ptr, t, tokens, l_m, l_k, scale_l, K) * huber
        sum_e += e
        sum_l += left
        sum_d += left * ratio - e
    mean_e = tl.div_rn(tl.sum(sum_e, 0), count)
    mean_l = tl.div_rn(tl.sum(sum_l, 0), count)
    mean_d = tl.div_rn(tl.sum(sum_d, 0), count)

    cosines = tl.zeros([BT], tl.float32)
    gains = tl.zeros([BT], tl.float32)
    squares_e = tl.zeros([K], tl.float32)
    squares_l = tl.zeros([K], tl.float32)
    squares_d = tl.zeros([K], tl.float32)
    actual = tl.zeros([K], tl.float32)
    products = tl.zeros([K], tl.float32)
    gram_e = tl.zeros([K, K], tl.float32)
    gram_l = tl.zeros([K, K], tl.float32)
    gram_el = tl.zeros([K, K], tl.float32)
    gram_ed = tl.zeros([K, K], tl.float32)
    for first in range(0, tokens, BT):
        t = first + block
        valid = t < tokens
        e = _load_tokens(e_ptr, t, tokens, e_m, e_k, scale_e, K)
        left = _load_tokens(l_ptr, t, tokens, l_m, l_k, scale_l, K)
        length_e = tl.maximum(tl.load(e_norms_ptr + t * en_m, mask=valid, other=1.0), TINY)
        length_l = tl.maximum(tl.load(l_norms_ptr + t * ln_m, mask=valid, other=1.0), TINY)
        units_e = tl.minimum(tl.div_rn(scale_e, length_e), COSINE)
        units_l = tl.minimum(tl.div_rn(scale_l, length_l), COSINE)
        cosines += tl.minimum(tl.maximum(tl.sum(e * left, 1) * units_e * units_l, -COSINE), COSINE)
        gains += _log(length_l) - _log(length_e)
        huber = _huber(e_norms_ptr, l_norms_ptr, t, tokens, en_m, ln_m, longest_e, longest_l)[:, None]
        e = e * huber
        left = left * huber
        d = left * ratio - e
        squares_e += tl.sum(e * e, 0)
        squares_l += tl.sum(left * left, 0)
        squares_d += tl.sum(d * d, 0)
        products += tl.sum(e * left, 0)
        ec = tl.where(valid[:, None], e - mean_e[None, :], 0.0)
        lc = tl.where(valid[:, None], left - mean_l[None, :], 0.0)
        dc = tl.where(valid[:, None], d - mean_d[None, :], 0.0)
        actual += tl.sum(dc * dc, 0)
        ec_T = tl.trans(ec)
        gram_e = tl.dot(ec_T, ec, gram_e, input_precision="ieee")
        gram_l = tl.dot(tl.trans(lc), lc, gram_l, input_precision="ieee")
        gram_el = tl.dot(ec_T, lc, gram_el, input_precision="ieee")
        gram_ed = tl.dot(ec_T, dc, gram_ed, input_precision="ieee")

    # <W, G W> as <G, W W^T>, whose products need few columns of W at a time.
    w_wT = tl.zeros([K, K], tl.float32)
    for first in range(0, K, BT):
        w = tl.load(w_ptr + k[:, None] * K + (first + block)[None, :])
        w_wT = tl.dot(w, tl.trans(w), w_wT, input_precision="ieee")
    places = k[:, None] * K + k[None, :]
    gram_e = tl.div_rn(gram_e, count)
    gram_ed = tl.div_rn(gram_ed, count)
    along = tl.sum(tl.sum(tl.load(w_ptr + places) * gram_ed, 1), 0)
    predicted = tl.maximum(tl.sum(tl.sum(w_wT * gram_e, 1), 0), 0.0)
    change = tl.div_rn(tl.sum(actual, 0), count)
    lengths = tl.maximum(tl.sqrt_rn(predicted) * tl.sqrt_rn(change), TINY)
    not_available = predicted <= 0.0
    correlation = tl.where(not_available, float("nan"), tl.div_rn(along, lengths))
    slope = tl.minimum(tl.maximum(tl.div_rn(along, tl.maximum(predicted, TINY)), -LARGEST), LARGEST)

    norm_e = tl.sqrt_rn(tl.sum(tl.sum(gram_e * gram_e, 1), 0))
    gram_l = tl.div_rn(gram_l, count)
    gram_el = tl.div_rn(gram_el, count)
    norm_l = tl.sqrt_rn(tl.sum(tl.sum(gram_l * gram_l, 1), 0))
    aligned = tl.sum(tl.sum(gram_el * gram_el, 1), 0)
    step = tl.div_rn(tl.sqrt_rn(tl.sum(squares_d, 0)), tl.maximum(tl.sqrt_rn(tl.sum(squares_e, 0)), TINY))

    scalars_ptr += message * 6
    tl.store(scalars_ptr, tl.div_rn(tl.sum(cosines, 0), count))
    tl.store(scalars_ptr + 1, tl.div_rn(tl.sum(gains, 0), count))
    tl.store(scalars_ptr + 2, tl.minimum(step, LARGEST))
    tl.store(scalars_ptr + 3, tl.div_rn(aligned, tl.maximum(norm_e * norm_l, TINY)))
    tl.store(scalars_ptr + 4, correlation)
    tl.store(scalars_ptr + 5, tl.where(not_available, float("nan"), slope))
    moments = tl.sqrt_rn(tl.div_rn(squares_e, count)) * tl.sqrt_rn(tl.div_rn(squares_l, count))
    cross = tl.div_rn(tl.div_rn(products, count), tl.maximum(moments, TINY))
    tl.store(cross_ptr + message * K + k, cross)
    a = tl.minimum(tl.maximum(gram_e * scale_e * scale_e, -LARGEST), LARGEST)
    b = tl.minimum(tl.maximum(gram_ed * scale_e * scale_e, -LARGEST), LARGEST)
    tl.store(a_ptr + message * K * K + places, a)
    tl.store(b_ptr + message * K * K + places, b)


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
    dots_Xm = (e_XmK * l_XmK).sum(-1)
    units_e_Xm, units_l_Xm = (
        (scale_X11[..., 0] / length_Xm).clamp_max(_COSINE)
        for scale_X11, length_Xm in ((scale_e_X11, length_e_Xm), (scale_l_X11, length_l_Xm))
    )
    cosine_Xm = (dots_Xm * units_e_Xm * units_l_Xm).clamp(-_COSINE, _COSINE)
    gain_X = (length_l_Xm.log() - length_e_Xm.log()).mean(-1)

    huber_Xm1 = huber_weights(entering_norms_Xm, leaving_norms_Xm)[..., None]
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


def huber_weights(entering_norms_Xm: torch.Tensor, leaving_norms_Xm: torch.Tensor) -> torch.Tensor:
    """float [..., m], at most 1: what shrinks both rows of a token."""
    entering_Xm, leaving_Xm = (
        2.0 * length_Xm.sqrt().sqrt().mean(-1, keepdim=True) ** 4 / length_Xm
        for length_Xm in (entering_norms_Xm.clamp_min(_TINY), leaving_norms_Xm.clamp_min(_TINY))
    )
    return torch.minimum(entering_Xm, leaving_Xm).clamp_max(1.0)


def _norm(matrix_XRC: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(matrix_XRC, dim=(-2, -1))
