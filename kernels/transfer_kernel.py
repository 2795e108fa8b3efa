"""The Triton kernel of ``transfer_statistics``: one program a message, which stays in the cache between its passes."""

from __future__ import annotations

from deepspeed_sentinel.kernels.dispatch import tl, triton
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS

SHAPE, WARPS = {"K": DIMENSIONS, "BT": 16}, 8


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
def _load_lengths(norms_ptr, t, tokens, stride_m):
    TINY: tl.constexpr = 1.1754943508222875e-38
    return tl.maximum(tl.load(norms_ptr + t * stride_m, mask=t < tokens, other=1.0), TINY)


@triton.jit
def _huber(length_e, length_l, longest_e, longest_l):
    weight = tl.minimum(tl.div_rn(longest_e, length_e), tl.div_rn(longest_l, length_l))
    return tl.minimum(weight, 1.0)


@triton.jit(do_not_specialize=["tokens", "en_M", "ln_M"])  # norms of short messages lie closer together
def transfer_kernel(
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
    w_M,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    """One message, three passes over its sketches: scales, means, everything else."""
    TINY: tl.constexpr = 1.1754943508222875e-38
    LARGEST: tl.constexpr = 3.4028234663852886e38
    RATIO: tl.constexpr = 2.0**50
    SHORT: tl.constexpr = 2.0**-63
    message = tl.program_id(0).to(tl.int64)
    e_ptr += message * e_M
    l_ptr += message * l_M
    e_norms_ptr += message * en_M
    l_norms_ptr += message * ln_M
    w_ptr += message * w_M
    block = tl.arange(0, BT)
    k = tl.arange(0, K)
    count = tl.cast(tokens, tl.float32)

    largest_e = tl.zeros([BT, K], tl.float32)
    largest_l = tl.zeros([BT, K], tl.float32)
    roots_e = tl.zeros([BT], tl.float32)
    roots_l = tl.zeros([BT], tl.float32)
    for first in range(0, tokens, BT):
        t = first + block
        length_e = _load_lengths(e_norms_ptr, t, tokens, en_m)
        length_l = _load_lengths(l_norms_ptr, t, tokens, ln_m)
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
        length_e = _load_lengths(e_norms_ptr, t, tokens, en_m)
        length_l = _load_lengths(l_norms_ptr, t, tokens, ln_m)
        huber = _huber(length_e, length_l, longest_e, longest_l)[:, None]
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
        length_e = _load_lengths(e_norms_ptr, t, tokens, en_m)
        length_l = _load_lengths(l_norms_ptr, t, tokens, ln_m)
        norms_e = tl.maximum(tl.sqrt_rn(tl.sum(e * e, 1)), SHORT)
        norms_l = tl.maximum(tl.sqrt_rn(tl.sum(left * left, 1)), SHORT)
        cosines += tl.div_rn(tl.div_rn(tl.sum(e * left, 1), norms_e), norms_l)
        gains += _log(length_l) - _log(length_e)
        huber = _huber(length_e, length_l, longest_e, longest_l)[:, None]
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
