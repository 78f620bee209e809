"""Mixed alignment in one pass over the classes: all sums of a tile of pairs from the same tiles of exponentials.

The mathematics is that of `gradmix/ops/mixed_alignment.py`. A program owns a tile of pairs. For a block of classes it
loads logits and U of its rows on either side once, forms the exponentials once, and feeds them to all the products:

    Z  +=  A B^T        U  +=  (lam A*U_a) B^T + A (mu B*U_b)^T        S  +=  A^2 (B^2)^T

with the label classes of the rows at zero. Of label vectors the label is the largest entry, and what they lack to its
one-hot vector, t, is summed as u is. The Gram product of the features follows in the same program, over an accumulator
that takes the place of the three. Decisions by the sign of the inner product need no norms: then the Gram product is
left out and, of class indices, S. The epilogue adds the two labels' terms in the log domain, without a difference of
probabilities and in units of the residual's own size, and either stores the pairs or sums them over groups of rows, so
that no N x M array is written. A kernel launched before it leaves for each row the largest logit outside of its label,
||h||^2 and, for label vectors, <t, u> and ||t||^2.

Both exponentials are scaled by 2^27, so that products and squares have float32's whole range: their largest sums,
2^54 C and 2^108 C, are finite for up to 2^19 classes, and what is lost is less than 2^-180 of the largest possible
square. Pairs whose sum over the other classes is less than 1e-20 of its largest possible term, and those whose residual
all but cancels t, are recomputed by the same program, row by row, from the mixed logits in float64.

Where there are few tiles, the sums over classes and features are split into parts (:func:`parts`), so that more
programs run at once. Each stores its sums of a tile, and a third launch adds the parts in their order and goes on from
there. The sums have room for seven float32 a pair and part, 8 MB at most. Equal sizes give equal parts, and the same
bits.

Several mixing weights are served by one launch. The program loops over them and has the Gram product, which does not
depend on them, kept in registers: formed anew for each, it would cost 2 d operations a pair beside 8 C.

The block of classes is the same in every configuration, and within a part so is the order of summation. Errors,
relative to the largest entry of a float64 computation from the same numbers: with precision ``"ieee"`` below 1e-5, and
1e-6 is typical (tests/kernels/test_kernels_mixed_alignment.py), of residuals of any size. On a GPU ``"tf32x3"`` is held
to the same figures, and ``"tf32"`` to 5e-3 (tests/kernels/test_gpu_kernels.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from gradmix.kernels import Variant, unit_of
from torch import Tensor

PRECISIONS = ("ieee", "tf32x3", "tf32")

LOG_SCALE = tl.constexpr(27.0)
UNSCALE = tl.constexpr(2.0**-54)
PAIR_SCALE = tl.constexpr(2.0**54)
UNDERFLOW = tl.constexpr(1e-20)
LOG_UNDERFLOW = tl.constexpr(-46.05)
NEGLIGIBLE = tl.constexpr(20.0)
CANCELLED = tl.constexpr(1 / 16)
LEAST = tl.constexpr(1e-30)  # the size at which residuals are held
LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)  # the logarithm of zero

_STRIDES = tuple(f"{name}_{side}_stride" for side in "ab" for name in ("features", "logits", "labels", "t", "u"))
_SIZES = ("n", "m", "rows_a", "rows_b", "classes", "width")
_NUMBERS = (*_SIZES, "count", "parts", "class_parts", "feature_parts", *_STRIDES)
"""Numbers for which Triton must not compile anew where they are 1 or multiples of 16: another batch is not to wait."""

# What the row kernel leaves for each row.
TOP = tl.constexpr(0)
SQUARE = tl.constexpr(1)
LABEL_U = tl.constexpr(2)
LABEL_SQUARE = tl.constexpr(3)

SUMS = tl.constexpr(7)  # that the sum kernel has room for, of each pair


# ---------------------------------------------------------------------------------------------------------------- rows


@triton.jit
def _statistics(
    block,
    features,
    logits,
    labels,
    t,
    u,
    out,
    rows,
    classes,
    width,
    features_stride,
    logits_stride,
    labels_stride,
    t_stride,
    u_stride,
    SOFT: tl.constexpr,
    NORMS: tl.constexpr,
    UNIT_C: tl.constexpr,
    UNIT_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(4, rows) ``out`` of ROWS rows, from number ``block`` of such blocks; sizes and strides are in units."""
    classes *= UNIT_C
    logits_stride *= UNIT_C
    t_stride *= UNIT_C
    u_stride *= UNIT_C
    width *= UNIT_D
    features_stride *= UNIT_D
    r = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = r < rows
    r = tl.minimum(r, rows - 1)
    top = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    label_u = tl.zeros((ROWS, COLUMNS), tl.float32)
    label_square = tl.zeros((ROWS, COLUMNS), tl.float32)
    label = tl.load(labels + r * labels_stride)
    for start in range(0, classes, COLUMNS):
        c = start + tl.arange(0, COLUMNS)[None, :]
        z = tl.load(logits + r[:, None] * logits_stride + c, mask=c < classes, other=float("-inf")).to(tl.float32)
        if SOFT:
            y = tl.load(t + r[:, None] * t_stride + c, mask=c < classes, other=0.0)
            v = tl.load(u + r[:, None] * u_stride + c, mask=c < classes, other=0.0)
            label_u += y * v
            label_square += y * y
        top = tl.maximum(top, tl.where(c == label[:, None], float("-inf"), z))
    largest = tl.max(top, 1)
    tl.store(out + TOP * rows + r, tl.where(largest == float("-inf"), 0.0, largest), mask=there)
    if NORMS:
        square = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, width, COLUMNS):
            c = start + tl.arange(0, COLUMNS)[None, :]
            h = tl.load(features + r[:, None] * features_stride + c, mask=c < width, other=0.0).to(tl.float32)
            square += h * h
        tl.store(out + SQUARE * rows + r, tl.sum(square, 1), mask=there)
    if SOFT:
        tl.store(out + LABEL_U * rows + r, tl.sum(label_u, 1), mask=there)
        tl.store(out + LABEL_SQUARE * rows + r, tl.sum(label_square, 1), mask=there)


@triton.jit(do_not_specialize=_NUMBERS)
def _row_kernel(
    features_a,
    logits_a,
    labels_a,
    t_a,
    u_a,
    out_a,
    features_b,
    logits_b,
    labels_b,
    t_b,
    u_b,
    out_b,
    rows_a,
    rows_b,
    classes,
    width,
    features_a_stride,
    logits_a_stride,
    labels_a_stride,
    t_a_stride,
    u_a_stride,
    features_b_stride,
    logits_b_stride,
    labels_b_stride,
    t_b_stride,
    u_b_stride,
    SOFT: tl.constexpr,
    NORMS: tl.constexpr,
    UNIT_C: tl.constexpr,
    UNIT_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Statistics of both sides' rows: the first programs have the rows of a, the others those of b."""
    block = tl.program_id(0)
    blocks_a = tl.cdiv(rows_a, ROWS)
    if block < blocks_a:
        _statistics(
            block, features_a, logits_a, labels_a, t_a, u_a, out_a, rows_a, classes, width,
            features_a_stride, logits_a_stride, labels_a_stride, t_a_stride, u_a_stride,
            SOFT, NORMS, UNIT_C, UNIT_D, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        _statistics(
            block - blocks_a, features_b, logits_b, labels_b, t_b, u_b, out_b, rows_b, classes, width,
            features_b_stride, logits_b_stride, labels_b_stride, t_b_stride, u_b_stride,
            SOFT, NORMS, UNIT_C, UNIT_D, ROWS, COLUMNS,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- pairs


@triton.jit
def _terms(rest, log_own, log_other, same, lam, mu, log_lam, log_mu):
    """Residuals of the two labels' classes in units of ``size``, and what turns the sums over the others into theirs.

    ``rest`` is the sum of the other classes' exponentials times 2^54. Where ``same``, the label's residual is the sum
    of both.
    """
    dtype: tl.constexpr = rest.dtype
    first = log_own + log_mu
    second = log_other + log_lam
    larger = tl.where(same, NOTHING, tl.maximum(first, second))
    ratio = (first - second).to(dtype)
    # A unit may be rounded; what is measured in it may not.
    log_sum = tl.log(tl.maximum(rest.to(tl.float32) * UNSCALE, 1e-37)).to(tl.float64)
    log_sum = tl.where(rest == 0.0, NOTHING / 2, log_sum)  # more than the logarithm of no D
    unit = tl.maximum(larger, log_sum)
    gap = -tl.abs(ratio)
    gap = tl.where(gap < -100.0, -100.0, gap)  # which leaves a NaN a NaN
    # exp(gap) - 1, by its series where the difference would cancel.
    small = gap * (1 + gap / 2 * (1 + gap / 3 * (1 + gap / 4 * (1 + gap / 5 * (1 + gap / 6 * (1 + gap / 7))))))
    shrunk = tl.where(gap > -0.3, small, tl.exp(gap) - 1)
    difference = tl.where(ratio > 0, -shrunk, shrunk) * tl.exp((larger - unit).to(dtype))
    scale = tl.exp(tl.minimum((-unit).to(dtype), 80.0)) * UNSCALE
    share = rest * scale
    whole = tl.exp(tl.minimum((log_own - unit).to(dtype), 80.0))
    whole += tl.where(same, 0.0, tl.exp(tl.minimum((log_other - unit).to(dtype), 80.0)))
    return difference - lam * share, -(difference + mu * share), scale, 1.0 / tl.maximum(whole + share, 1e-30), larger


@triton.jit
def _with_labels(rest, rest_u, log_own, log_other, u_own, u_other, same, lam, mu, log_lam, log_mu, classes):
    """<r, u> in units of size, size, whether they are lost, and the terms, all of a tile."""
    own, other, scale, size, larger = _terms(rest, log_own, log_other, same, lam, mu, log_lam, log_mu)
    inner = scale * rest_u + own * u_own + other * u_other
    there = (classes > 2) | (same & (classes > 1))
    lost = there & (rest * UNSCALE < UNDERFLOW) & (larger < LOG_UNDERFLOW + NEGLIGIBLE)
    return inner, tl.maximum(size, LEAST), lost, own, other, scale


@triton.jit
def _square(rest_square, own, other, scale, same):
    """||r||^2 in units of size^2."""
    root = tl.sqrt_rn(rest_square) * scale
    return root * root + own * own + other * other + tl.where(same, 2.0 * own * other, 0.0)


@triton.jit
def _gram(
    features_a, row_a, stride_a, features_b, row_b, stride_b, first, last,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<h_i, h_j> of a tile, over the features from ``first`` to before ``last``."""
    gram = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(first, last, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)[None, :]
        h_a = tl.load(features_a + row_a[:, None] * stride_a + k, mask=k < last, other=0.0).to(tl.float32)
        h_b = tl.load(features_b + row_b[:, None] * stride_b + k, mask=k < last, other=0.0).to(tl.float32)
        gram = tl.dot(h_a, tl.trans(h_b), gram, input_precision=PRECISION)
    return gram


@triton.jit
def _class_sums(
    logits_a, label_a, t_a, u_a, row_a, top_a, rate_a, logits_a_stride, t_a_stride, u_a_stride,
    logits_b, label_b, t_b, u_b, row_b, top_b, rate_b, logits_b_stride, t_b_stride, u_b_stride,
    lam, mu, first, last, SOFT: tl.constexpr, NORMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Z, U, S and, for t, what U is for u: of a tile, over the classes from ``first`` to before ``last``."""
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    total_u = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    total_square = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    total_t = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(first, last, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        inside = c < last
        z_a = tl.load(logits_a + row_a[:, None] * logits_a_stride + c, mask=inside, other=0.0).to(tl.float32)
        z_b = tl.load(logits_b + row_b[:, None] * logits_b_stride + c, mask=inside, other=0.0).to(tl.float32)
        v_a = tl.load(u_a + row_a[:, None] * u_a_stride + c, mask=inside, other=0.0)
        v_b = tl.load(u_b + row_b[:, None] * u_b_stride + c, mask=inside, other=0.0)
        use_a = inside & (c != label_a[:, None])
        use_b = inside & (c != label_b[:, None])
        # Of a label's logit, which may be far above the others, the exponential might be infinite.
        a = tl.where(use_a, tl.exp2(tl.where(use_a, z_a - top_a[:, None], 0.0) * rate_a + LOG_SCALE), 0.0)
        b = tl.where(use_b, tl.exp2(tl.where(use_b, z_b - top_b[:, None], 0.0) * rate_b + LOG_SCALE), 0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
        total_u = tl.dot(a * (lam * v_a), tl.trans(b), total_u, input_precision=PRECISION)
        total_u = tl.dot(a, tl.trans(b * (mu * v_b)), total_u, input_precision=PRECISION)
        if NORMS or SOFT:
            total_square = tl.dot(a * a, tl.trans(b * b), total_square, input_precision=PRECISION)
        if SOFT:
            w_a = tl.load(t_a + row_a[:, None] * t_a_stride + c, mask=inside, other=0.0)
            w_b = tl.load(t_b + row_b[:, None] * t_b_stride + c, mask=inside, other=0.0)
            total_t = tl.dot(a * (lam * w_a), tl.trans(b), total_t, input_precision=PRECISION)
            total_t = tl.dot(a, tl.trans(b * (mu * w_b)), total_t, input_precision=PRECISION)
    return total, total_u, total_square, total_t


@triton.jit
def _label_sums(
    t_a, u_a, row_a, t_a_stride, u_a_stride, t_b, u_b, row_b, t_b_stride, u_b_stride, first, last,
    PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """<t_i, u_j> + <u_i, t_j> and <t_i, t_j> of a tile, over the classes from ``first`` to before ``last``."""
    label_u = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    label_square = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(first, last, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        inside = c < last
        v_a = tl.load(u_a + row_a[:, None] * u_a_stride + c, mask=inside, other=0.0)
        v_b = tl.load(u_b + row_b[:, None] * u_b_stride + c, mask=inside, other=0.0)
        w_a = tl.load(t_a + row_a[:, None] * t_a_stride + c, mask=inside, other=0.0)
        w_b = tl.load(t_b + row_b[:, None] * t_b_stride + c, mask=inside, other=0.0)
        label_u = tl.dot(w_a, tl.trans(v_b), label_u, input_precision=PRECISION)
        label_u = tl.dot(v_a, tl.trans(w_b), label_u, input_precision=PRECISION)
        label_square = tl.dot(w_a, tl.trans(w_b), label_square, input_precision=PRECISION)
    return label_u, label_square


@triton.jit
def _row_again(
    i, features_a, logits_a, labels_a, t_a, u_a, features_b, logits_b, labels_b, t_b, u_b, row_b, square_a, square_b,
    features_a_stride, logits_a_stride, labels_a_stride, t_a_stride, u_a_stride,
    features_b_stride, logits_b_stride, labels_b_stride, t_b_stride, u_b_stride,
    classes, width, lam64, mu64, lam, mu, log_lam, log_mu,
    SOFT: tl.constexpr, NORMS: tl.constexpr, BIAS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """<r, u> and, if NORMS, ||g|| of row ``i`` of one side with the tile's rows of the other, by their mixed logits."""
    most = tl.full((BLOCK_B,), float("-inf"), tl.float64)
    rest = tl.zeros((BLOCK_B,), tl.float64)
    first = tl.zeros((BLOCK_B,), tl.float64)
    second = tl.zeros((BLOCK_B,), tl.float64)
    label_a = tl.load(labels_a + i * labels_a_stride)
    label_b = tl.load(labels_b + row_b * labels_b_stride)
    # 1. The largest mixed logit of the other classes.
    for start in range(0, classes, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        use = (c < classes) & (row_b >= 0)[:, None] & (c != label_a) & (c != label_b[:, None])
        z_a = tl.load(logits_a + i * logits_a_stride + c, mask=c < classes, other=0.0).to(tl.float64)
        z_b = tl.load(logits_b + row_b[:, None] * logits_b_stride + c, mask=c < classes, other=0.0).to(tl.float64)
        most = tl.maximum(most, tl.max(tl.where(use, lam64 * z_a + mu64 * z_b, float("-inf")), 1))
    # 2. The sum of their exponentials.
    for start in range(0, classes, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        use = (c < classes) & (row_b >= 0)[:, None] & (c != label_a) & (c != label_b[:, None])
        z_a = tl.load(logits_a + i * logits_a_stride + c, mask=c < classes, other=0.0).to(tl.float64)
        z_b = tl.load(logits_b + row_b[:, None] * logits_b_stride + c, mask=c < classes, other=0.0).to(tl.float64)
        e = tl.where(use, lam64 * z_a + mu64 * z_b - most[:, None], 0.0)
        rest += tl.sum(tl.where(use, tl.exp(e), 0.0), 1)
    # 3. The residuals of the labels' classes.
    own_b = logits_b + row_b * logits_b_stride
    top = tl.where(most == float("-inf"), 0.0, most)
    log_own = (
        lam64 * tl.load(logits_a + i * logits_a_stride + label_a).to(tl.float64)
        + mu64 * tl.load(own_b + label_a).to(tl.float64) - top
    )  # fmt: skip
    log_other = (
        lam64 * tl.load(logits_a + i * logits_a_stride + label_b).to(tl.float64)
        + mu64 * tl.load(own_b + label_b).to(tl.float64) - top
    )  # fmt: skip
    own, other, scale, size, _ = _terms(
        rest * PAIR_SCALE, log_own, log_other, label_b == label_a, lam64, mu64, log_lam, log_mu
    )
    # Beside t it may be as small as it is.
    size = tl.maximum(size, 1e-290 if SOFT else LEAST)
    # 4. All residuals, in units of size and then with t.
    for start in range(0, classes, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        inside = (c < classes) & (row_b >= 0)[:, None]
        at_a = inside & (c == label_a)
        at_b = inside & (c == label_b[:, None])
        use = inside & (c != label_a) & (c != label_b[:, None])
        z_a = tl.load(logits_a + i * logits_a_stride + c, mask=c < classes, other=0.0).to(tl.float64)
        z_b = tl.load(logits_b + row_b[:, None] * logits_b_stride + c, mask=c < classes, other=0.0).to(tl.float64)
        e = tl.where(use, lam64 * z_a + mu64 * z_b - most[:, None], 0.0)
        r = tl.where(use, tl.exp(e) * (scale * PAIR_SCALE)[:, None], 0.0)
        r += tl.where(at_a, own[:, None], 0.0) + tl.where(at_b, other[:, None], 0.0)
        v_a = tl.load(u_a + i * u_a_stride + c, mask=c < classes, other=0.0).to(tl.float64)
        v_b = tl.load(u_b + row_b[:, None] * u_b_stride + c, mask=c < classes, other=0.0).to(tl.float64)
        if SOFT:
            w_a = tl.load(t_a + i * t_a_stride + c, mask=c < classes, other=0.0).to(tl.float64)
            w_b = tl.load(t_b + row_b[:, None] * t_b_stride + c, mask=c < classes, other=0.0).to(tl.float64)
            r = r * size[:, None] + (lam64 * w_a + mu64 * w_b)
        first += tl.sum(r * (lam64 * v_a + mu64 * v_b), 1)
        if NORMS:
            second += tl.sum(r * r, 1)
    if not SOFT:
        first *= size
    inner = first.to(tl.float32)
    if not NORMS:
        return inner, inner
    second = tl.sqrt(second)
    if not SOFT:
        second *= size
    residual = second.to(tl.float32)
    gram = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, width, BLOCK_C):
        k = start + tl.arange(0, BLOCK_C)[None, :]
        h_a = tl.load(features_a + i * features_a_stride + k, mask=k < width, other=0.0).to(tl.float32)
        h_b = tl.load(features_b + row_b[:, None] * features_b_stride + k, mask=k < width, other=0.0).to(tl.float32)
        gram += tl.sum(h_a * h_b, 1)
    return inner, _norm(residual, gram, square_a, square_b, lam, mu, BIAS)


@triton.jit
def _not_negative(x):
    """The larger of x and 0; NaN stays NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _norm(residual, gram, square_a, square_b, lam, mu, BIAS: tl.constexpr):
    """||r|| ||lam h_i + mu h_j||, the features with a 1 appended if there is a bias."""
    mixed = lam * lam * square_a + 2.0 * lam * mu * gram + mu * mu * square_b
    mixed = _not_negative(mixed)
    if BIAS:
        mixed += 1.0
    return residual * tl.sqrt_rn(mixed)


@triton.jit
def _weights(lam64):
    """lam, 1 - lam in float64 and float32, and the factors of either side's logits in the exponents of 2."""
    mu64 = 1.0 - lam64
    rate_a = (lam64 * LOG2_E).to(tl.float32)
    rate_b = (mu64 * LOG2_E).to(tl.float32)
    return mu64, lam64.to(tl.float32), mu64.to(tl.float32), rate_a, rate_b


@triton.jit
def _part(terms, parts, part, BLOCK: tl.constexpr):
    """First term of number ``part`` of ``parts`` parts of a sum, in whole blocks, and the one after its last."""
    share = tl.cdiv(tl.cdiv(terms, BLOCK), parts) * BLOCK
    return part * share, tl.minimum((part + 1) * share, terms)


@triton.jit(do_not_specialize=_NUMBERS)
def _sum_kernel(
    features_a, logits_a, labels_a, t_a, u_a, statistics_a,
    features_b, logits_b, labels_b, t_b, u_b, statistics_b,
    lams, sums,
    n, m, rows_a, rows_b, classes, width, class_parts, feature_parts,
    features_a_stride, logits_a_stride, labels_a_stride, t_a_stride, u_a_stride,
    features_b_stride, logits_b_stride, labels_b_stride, t_b_stride, u_b_stride,
    SOFT: tl.constexpr, NORMS: tl.constexpr, PRECISION: tl.constexpr, UNIT_C: tl.constexpr, UNIT_D: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of one tile of pairs of rows over one part of the classes and of the features, for one mixing weight.

    They are stored in ``sums`` (parts, SUMS, tiles, BLOCK_A * BLOCK_B) float32, in the order of :func:`_add_parts`.
    """
    classes *= UNIT_C
    logits_a_stride *= UNIT_C
    logits_b_stride *= UNIT_C
    t_a_stride *= UNIT_C
    t_b_stride *= UNIT_C
    u_a_stride *= UNIT_C
    u_b_stride *= UNIT_C
    width *= UNIT_D
    features_a_stride *= UNIT_D
    features_b_stride *= UNIT_D
    tiles_b = tl.cdiv(m, BLOCK_B)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    # Rows that are not there take another's place: what is summed for them is not used.
    row_a = tl.minimum((tile // tiles_b).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A), n - 1)
    row_b = tl.minimum((tile % tiles_b).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B), m - 1)
    top_a = tl.load(statistics_a + TOP * rows_a + row_a)
    top_b = tl.load(statistics_b + TOP * rows_b + row_b)
    label_a = tl.load(labels_a + row_a * labels_a_stride)
    label_b = tl.load(labels_b + row_b * labels_b_stride)
    _, lam, mu, rate_a, rate_b = _weights(tl.load(lams))
    span = tl.num_programs(0) * (BLOCK_A * BLOCK_B)
    at = tl.arange(0, BLOCK_A)[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    out = sums + part * SUMS * span + tile * (BLOCK_A * BLOCK_B) + at
    first, last = _part(classes, class_parts, part, BLOCK_C)
    total, total_u, total_square, total_t = _class_sums(
        logits_a, label_a, t_a, u_a, row_a, top_a, rate_a, logits_a_stride, t_a_stride, u_a_stride,
        logits_b, label_b, t_b, u_b, row_b, top_b, rate_b, logits_b_stride, t_b_stride, u_b_stride,
        lam, mu, first, last, SOFT, NORMS, PRECISION, BLOCK_A, BLOCK_B, BLOCK_C,
    )  # fmt: skip
    tl.store(out, total)
    tl.store(out + span, total_u)
    if NORMS or SOFT:
        tl.store(out + 2 * span, total_square)
    if SOFT:
        tl.store(out + 3 * span, total_t)
        label_u, label_square = _label_sums(
            t_a, u_a, row_a, t_a_stride, u_a_stride, t_b, u_b, row_b, t_b_stride, u_b_stride,
            first, last, PRECISION, BLOCK_A, BLOCK_B, BLOCK_C,
        )  # fmt: skip
        tl.store(out + 4 * span, label_u)
        tl.store(out + 5 * span, label_square)
    if NORMS:
        first, last = _part(width, feature_parts, part, BLOCK_C)
        gram = _gram(
            features_a, row_a, features_a_stride, features_b, row_b, features_b_stride, first, last,
            BLOCK_A, BLOCK_B, BLOCK_C, PRECISION,
        )  # fmt: skip
        tl.store(out + 6 * span, gram)


@triton.jit
def _add_parts(
    sums, tile, parts,
    SOFT: tl.constexpr, NORMS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The sums of :func:`_sum_kernel` over all parts, added in their order; zeros for what it does not form."""
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    total_u = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    total_square = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    total_t = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    label_u = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    label_square = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    gram = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    span = tl.num_programs(0) * (BLOCK_A * BLOCK_B)
    at = tl.arange(0, BLOCK_A)[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    at = sums + tile * (BLOCK_A * BLOCK_B) + at
    for _ in range(parts):
        total += tl.load(at)
        total_u += tl.load(at + span)
        if NORMS or SOFT:
            total_square += tl.load(at + 2 * span)
        if SOFT:
            total_t += tl.load(at + 3 * span)
            label_u += tl.load(at + 4 * span)
            label_square += tl.load(at + 5 * span)
        if NORMS:
            gram += tl.load(at + 6 * span)
        at += SUMS * span
    return total, total_u, total_square, total_t, label_u, label_square, gram


@triton.jit(do_not_specialize=_NUMBERS)
def _pair_kernel(
    features_a, logits_a, labels_a, t_a, u_a, statistics_a,
    features_b, logits_b, labels_b, t_b, u_b, statistics_b,
    lams, slots, sums, inner_out, norm_out,
    n, m, rows_a, rows_b, classes, width, count, parts,
    features_a_stride, logits_a_stride, labels_a_stride, t_a_stride, u_a_stride,
    features_b_stride, logits_b_stride, labels_b_stride, t_b_stride, u_b_stride,
    SOFT: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, SEVERAL: tl.constexpr, NORMS: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, UNIT_C: tl.constexpr, UNIT_D: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All mixing weights of one tile of pairs; n x m of them, of rows or (GROUP > 0) of slots that name rows.

    If SPLIT, :func:`_sum_kernel` has left the sums over classes and features in ``sums``, in ``parts`` parts; there is
    then one mixing weight, and no slots. Without NORMS no norm is written; of label vectors it is formed in any case,
    as it shows what has to be recomputed. Sizes and strides are in units, see :class:`_Units`.
    """
    classes *= UNIT_C
    logits_a_stride *= UNIT_C
    logits_b_stride *= UNIT_C
    t_a_stride *= UNIT_C
    t_b_stride *= UNIT_C
    u_a_stride *= UNIT_C
    u_b_stride *= UNIT_C
    width *= UNIT_D
    features_a_stride *= UNIT_D
    features_b_stride *= UNIT_D
    tiles_b = tl.cdiv(m, BLOCK_B)
    tile_a = (tl.program_id(0) // tiles_b).to(tl.int64)
    tile_b = (tl.program_id(0) % tiles_b).to(tl.int64)
    at_a = tile_a * BLOCK_A + tl.arange(0, BLOCK_A)
    at_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    # Rows that are not there take another's place: what is loaded for them is not used.
    if GROUP > 0:
        row_a = tl.load(slots + at_a, mask=at_a < n, other=-1)
        row_b = tl.load(slots + at_b, mask=at_b < m, other=-1)
        counted = (row_a >= 0)[:, None] & (row_b >= 0)[None, :] & (row_a[:, None] != row_b[None, :])
        row_a = tl.maximum(row_a, 0)
        row_b = tl.maximum(row_b, 0)
    else:
        counted = (at_a < n)[:, None] & (at_b < m)[None, :]
        row_a = tl.minimum(at_a, n - 1)
        row_b = tl.minimum(at_b, m - 1)
    top_a = tl.load(statistics_a + TOP * rows_a + row_a)
    top_b = tl.load(statistics_b + TOP * rows_b + row_b)
    label_a = tl.load(labels_a + row_a * labels_a_stride)
    label_b = tl.load(labels_b + row_b * labels_b_stride)
    if SEVERAL and NORMS:
        gram = _gram(
            features_a, row_a, features_a_stride, features_b, row_b, features_b_stride, 0, width,
            BLOCK_A, BLOCK_B, BLOCK_C, PRECISION,
        )  # fmt: skip
    for node in range(count if SEVERAL else 1):
        lam64 = tl.load(lams + node)
        mu64, lam, mu, rate_a, rate_b = _weights(lam64)
        log_lam = tl.where(lam64 > 0.0, tl.log(tl.where(lam64 > 0.0, lam64, 1.0)), NOTHING)
        log_mu = tl.where(mu64 > 0.0, tl.log(tl.where(mu64 > 0.0, mu64, 1.0)), NOTHING)
        if SPLIT:
            total, total_u, total_square, total_t, label_u, label_square, gram = _add_parts(
                sums, tile_a * tiles_b + tile_b, parts, SOFT, NORMS, BLOCK_A, BLOCK_B
            )
        else:
            total, total_u, total_square, total_t = _class_sums(
                logits_a, label_a, t_a, u_a, row_a, top_a, rate_a, logits_a_stride, t_a_stride, u_a_stride,
                logits_b, label_b, t_b, u_b, row_b, top_b, rate_b, logits_b_stride, t_b_stride, u_b_stride,
                lam, mu, 0, classes, SOFT, NORMS, PRECISION, BLOCK_A, BLOCK_B, BLOCK_C,
            )  # fmt: skip
        # Zero, which the compiler cannot know: or else it forms the tile's addresses before the loop over the
        # classes, and they fill the registers all through it.
        zero = (tl.sum(tl.sum(total, 1), 0) < 0.0).to(tl.int64)
        at_a_z = row_a * logits_a_stride + zero
        at_b_z = row_b * logits_b_stride + zero
        # Logits of 1e4 leave float32 no digits for their differences.
        tops = (lam64 * top_a.to(tl.float64))[:, None] + (mu64 * top_b.to(tl.float64))[None, :]
        own_a = tl.load(logits_a + at_a_z + label_a).to(tl.float64)
        own_b = tl.load(logits_b + at_b_z + label_b).to(tl.float64)
        a_at_b = tl.load(logits_a + at_a_z[:, None] + label_b[None, :]).to(tl.float64)
        b_at_a = tl.load(logits_b + at_b_z[None, :] + label_a[:, None]).to(tl.float64)
        log_own = (lam64 * own_a)[:, None] + mu64 * b_at_a - tops
        log_other = lam64 * a_at_b + (mu64 * own_b)[None, :] - tops
        at_a_u = row_a * u_a_stride + zero
        at_b_u = row_b * u_b_stride + zero
        u_own_a = tl.load(u_a + at_a_u + label_a)
        u_own_b = tl.load(u_b + at_b_u + label_b)
        u_a_at_b = tl.load(u_a + at_a_u[:, None] + label_b[None, :])
        u_b_at_a = tl.load(u_b + at_b_u[None, :] + label_a[:, None])
        u_own = (lam * u_own_a)[:, None] + mu * u_b_at_a
        u_other = lam * u_a_at_b + (mu * u_own_b)[None, :]
        same = label_a[:, None] == label_b[None, :]
        inner, size, lost, own, other, scale = _with_labels(
            total, total_u, log_own, log_other, u_own, u_other, same, lam, mu, log_lam, log_mu, classes
        )
        if NORMS or SOFT:
            square = _square(total_square, own, other, scale, same)
        if SOFT:
            at_a_t = row_a * t_a_stride + zero
            at_b_t = row_b * t_b_stride + zero
            t_own_a = tl.load(t_a + at_a_t + label_a)
            t_own_b = tl.load(t_b + at_b_t + label_b)
            t_a_at_b = tl.load(t_a + at_a_t[:, None] + label_b[None, :])
            t_b_at_a = tl.load(t_b + at_b_t[None, :] + label_a[:, None])
            cross = scale * total_t
            cross += own * ((lam * t_own_a)[:, None] + mu * t_b_at_a)
            cross += other * (lam * t_a_at_b + (mu * t_own_b)[None, :])
            if not SPLIT:
                label_u, label_square = _label_sums(
                    t_a, u_a, row_a, t_a_stride, u_a_stride, t_b, u_b, row_b, t_b_stride, u_b_stride,
                    0, classes, PRECISION, BLOCK_A, BLOCK_B, BLOCK_C,
                )  # fmt: skip
            own_u_a = tl.load(statistics_a + LABEL_U * rows_a + row_a)[:, None]
            own_u_b = tl.load(statistics_b + LABEL_U * rows_b + row_b)[None, :]
            own_square_a = tl.load(statistics_a + LABEL_SQUARE * rows_a + row_a)[:, None]
            own_square_b = tl.load(statistics_b + LABEL_SQUARE * rows_b + row_b)[None, :]
            toward = lam * lam * own_u_a + lam * mu * label_u + mu * mu * own_u_b
            beside = lam * lam * own_square_a + 2.0 * lam * mu * label_square + mu * mu * own_square_b
            beside = tl.sqrt_rn(_not_negative(beside))
            # Both parts of r in units of the larger.
            most = tl.maximum(beside, size)
            first = size / most
            second = beside / most
            inner = (inner * first + toward / most) * most
            squares = square * first * first + second * second
            square = squares + 2.0 * first * (cross / most)
            lost = lost | ((square < squares * CANCELLED) & (second > 0.0))
            size = most
        if not SOFT:
            inner *= size
        lost = counted & lost
        inner = tl.where(counted, inner, 0.0)
        square_b = top_b
        if NORMS:
            residual = tl.sqrt_rn(_not_negative(square)) * size
            if not (SEVERAL or SPLIT):
                gram = _gram(
                    features_a, row_a, features_a_stride, features_b, row_b, features_b_stride, 0, width,
                    BLOCK_A, BLOCK_B, BLOCK_C, PRECISION,
                )  # fmt: skip
            square_a = tl.load(statistics_a + SQUARE * rows_a + row_a)
            square_b = tl.load(statistics_b + SQUARE * rows_b + row_b)
            norm = _norm(residual, gram, square_a[:, None], square_b[None, :], lam, mu, BIAS)
            norm = tl.where(counted, norm, 0.0)
        if tl.max(tl.max(lost.to(tl.int32), 1), 0) > 0:
            for t in range(BLOCK_A):
                here = (tl.arange(0, BLOCK_A) == t)[:, None]
                lost_t = tl.max((lost & here).to(tl.int32), 0) > 0
                if tl.max(lost_t.to(tl.int32), 0) > 0:
                    i = tl.sum(tl.where(tl.arange(0, BLOCK_A) == t, row_a, 0), 0) + zero
                    inner_t, norm_t = _row_again(
                        i, features_a, logits_a, labels_a, t_a, u_a, features_b, logits_b, labels_b, t_b, u_b,
                        row_b + zero, tl.load(statistics_a + (SQUARE if NORMS else TOP) * rows_a + i), square_b,
                        features_a_stride, logits_a_stride, labels_a_stride, t_a_stride, u_a_stride,
                        features_b_stride, logits_b_stride, labels_b_stride, t_b_stride, u_b_stride,
                        classes, width, lam64, mu64, lam, mu, log_lam, log_mu, SOFT, NORMS, BIAS, BLOCK_B, BLOCK_C,
                    )  # fmt: skip
                    replace = here & lost_t[None, :]
                    inner = tl.where(replace, inner_t[None, :], inner)
                    if NORMS:
                        norm = tl.where(replace, norm_t[None, :], norm)
        if GROUP > 1:
            inner = tl.sum(tl.reshape(inner, (BLOCK_A, BLOCK_B // GROUP, GROUP)), 2)
            inner = tl.sum(tl.reshape(inner, (BLOCK_A // GROUP, GROUP, BLOCK_B // GROUP)), 1)
            if NORMS:
                norm = tl.sum(tl.reshape(norm, (BLOCK_A, BLOCK_B // GROUP, GROUP)), 2)
                norm = tl.sum(tl.reshape(norm, (BLOCK_A // GROUP, GROUP, BLOCK_B // GROUP)), 1)
            out_a = tile_a * (BLOCK_A // GROUP) + tl.arange(0, BLOCK_A // GROUP)
            out_b = tile_b * (BLOCK_B // GROUP) + tl.arange(0, BLOCK_B // GROUP)
            columns = m // GROUP
            lines = n // GROUP
        else:
            out_a = at_a
            out_b = at_b
            columns = m
            lines = n
        at = (node * lines + out_a)[:, None] * columns + out_b[None, :]
        within = (out_a < lines)[:, None] & (out_b < columns)[None, :]
        tl.store(inner_out + at, inner, mask=within)
        if NORMS:
            tl.store(norm_out + at, norm, mask=within)


# ------------------------------------------------------------------------------------------------------ configurations


class Configuration(NamedTuple):
    """The tiling of the pairs.

    A product in three TF32 parts has every warp compute 16 whole rows of a tile. So a tile is high and narrow: of a
    wide one with fewer rows than 16 a warp, warps repeat each other's work, and its numbers fill their registers.

    Attributes:
        rows_a: rows of the first side in a tile.
        rows_b: rows of the second side.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
        max_spills: bytes a thread may spill. Almost all of it is outside of the loop over the classes: the epilogue
            gathers four entries a pair, once a tile and mixing weight, and the recomputation of lost pairs seldom runs.
    """

    rows_a: int
    rows_b: int
    num_warps: int
    num_stages: int
    max_spills: int = 0


CLASSES = 16
"""Classes (and features) of a block, in every configuration. With 32, fragments of the tiles fill the registers."""

HARD = (Configuration(128, 16, 8, 2, max_spills=512), Configuration(64, 16, 4, 2, max_spills=512))
"""For class indices, from the largest tile to the smallest."""

SOFT = (Configuration(64, 16, 8, 2, max_spills=512),)
"""For label vectors, whose sums are twice as many."""

ENOUGH_TILES = 112
"""Tiles that keep a large GPU's 108 to 132 multiprocessors busy; with fewer, a smaller tile is better."""

PROGRAMS = 264
"""Programs of sums that a large GPU runs at once: two on each of 132 multiprocessors, for which registers suffice."""

LEAST_PART, MOST_PARTS = 128, 16
"""Terms of the smallest part of a sum, and parts of the longest: see :func:`parts`."""

ROWS, COLUMNS, ROW_WARPS = 4, 256, 4  # of the row kernel

LARGEST_GROUP = 16


def configuration(n: int, m: int, soft: bool) -> Configuration:
    """The configuration for n x m pairs: the largest tile of which there are enough, or else the smallest."""
    table = SOFT if soft else HARD
    for choice in table:
        if triton.cdiv(n, choice.rows_a) * triton.cdiv(m, choice.rows_b) >= ENOUGH_TILES:
            return choice
    return table[-1]


def parts(tiles: int, terms: int) -> int:
    """The number of programs that share a tile's sum of ``terms`` classes or features, if there are ``tiles`` of pairs.

    A program takes 16 terms at a turn, and each turn waits for its loads and products. 256 x 256 pairs are 64 tiles:
    half of a large GPU idles through 63 turns for 1,000 classes and 128 for 2,048 features. Four parts are 256 programs
    with a quarter of the turns each. They cost a launch and, where the parts are added, a load for each of them. If a
    turn takes 1 us, a launch 2 us and a load 0.5 us, two parts of eight turns save 8 us for 3 us, and of 128 turns
    sqrt(128 / 0.5) = 16 parts are the best number. None of this has been measured on a device.
    """
    if tiles >= ENOUGH_TILES:
        return 1
    return max(1, min(PROGRAMS // tiles, terms // LEAST_PART, MOST_PARTS))


def _sum_warps(choice: Configuration, precision: str) -> int:
    """Warps of a program of sums: one for 16 rows; of more, some would repeat each other's work.

    Products in float32, which no warp repeats, are shared by more for want of registers.
    """
    return choice.num_warps if precision == "ieee" else choice.rows_a // 16


# -------------------------------------------------------------------------------------------------------------- calls


class _Rows(NamedTuple):
    """One side's rows, each of them contiguous."""

    features: Tensor
    logits: Tensor
    labels: Tensor
    t: Tensor
    u: Tensor

    def strides(self, units: _Units) -> tuple[int, int, int, int, int]:
        """Strides of the rows in units; label vectors have t, class indices none."""
        logits, t, u = (part.stride(0) // units.classes for part in (self.logits, self.t, self.u))
        return self.features.stride(0) // units.width, logits, self.labels.stride(0), t, u


class _Units(NamedTuple):
    """Units of sizes and strides (:func:`gradmix.kernels.unit_of`).

    Attributes:
        classes: of the number of classes and of the strides of what has a number a class.
        width: of the number of features and their strides.
    """

    classes: int
    width: int


def _units(*sides: _Rows) -> _Units:
    of_classes: list[int] = []
    of_width: list[int] = []
    for side in sides:
        of_width += [side.features.shape[1], side.features.stride(0)]
        of_classes.append(side.logits.shape[1])
        of_classes += [part.stride(0) for part in (side.logits, side.t, side.u) if part.ndim > 1]
    return _Units(unit_of(*of_classes), unit_of(*of_width))


def _rows(features: Tensor, logits: Tensor, labels: Tensor, u: Tensor) -> _Rows:
    def with_unit_stride(x: Tensor) -> Tensor:
        return x if x.ndim < 2 or x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous()

    u, t = with_unit_stride(u), labels
    if labels.is_floating_point():
        labels = labels.argmax(1)
        # What they lack to the one-hot vectors of their largest entries.
        t = torch.zeros_like(t, dtype=torch.float32).scatter_(1, labels[:, None], 1.0).sub_(t)
    return _Rows(with_unit_stride(features), with_unit_stride(logits), labels, with_unit_stride(t), u)


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")


def _row_statistics(a: _Rows, b: _Rows, norms: bool, units: _Units) -> tuple[Tensor, Tensor]:
    """(4, N) and (4, M) float32, of both sides in one launch, and of one if it is both."""
    n, classes = a.logits.shape
    m = len(b.logits)
    width = a.features.shape[1]
    out_a = a.u.new_empty(4, n)
    out_b = out_a if b is a else a.u.new_empty(4, m)
    blocks = triton.cdiv(n, ROWS) + (0 if b is a else triton.cdiv(m, ROWS))
    _row_kernel[(blocks,)](
        *a, out_a, *b, out_b, n, m, classes // units.classes, width // units.width,
        *a.strides(units), *b.strides(units), SOFT=a.t.is_floating_point(), NORMS=norms,
        UNIT_C=units.classes, UNIT_D=units.width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=ROW_WARPS,
    )  # fmt: skip
    return out_a, out_b


def _launch(
    a: _Rows, b: _Rows, lams: Tensor, slots: Tensor | None, group: int, bias: bool, precision: str, norms: bool = True
) -> tuple[Tensor, Tensor]:
    soft = a.t.is_floating_point()
    n, m = (len(a.logits), len(b.logits)) if slots is None else (len(slots), len(slots))
    shape = (len(lams), n // group, m // group)
    inner, norm = a.u.new_empty(shape), a.u.new_empty(shape if norms else 0)
    if not inner.numel():
        return inner, norm
    if not len(a.logits):
        return inner.zero_(), norm.zero_()  # every slot is empty
    classes, width = a.logits.shape[1], a.features.shape[1]
    choice = configuration(n, m, soft)
    tiles = triton.cdiv(n, choice.rows_a) * triton.cdiv(m, choice.rows_b)
    # A class table has several weights and at least a row a class: its sums would be in two parts at the most.
    splits = slots is None and len(lams) == 1
    class_parts = parts(tiles, classes) if splits else 1
    feature_parts = parts(tiles, width) if splits and norms else 1
    most = max(class_parts, feature_parts)
    sums = inner if most == 1 else a.u.new_empty(most, SUMS.value, tiles, choice.rows_a * choice.rows_b)
    with torch.cuda.device_of(a.logits):
        units = _units(a, b)
        statistics_a, statistics_b = _row_statistics(a, b, norms, units)
        sides = (*a, statistics_a, *b, statistics_b)
        sizes = (n, m, len(a.logits), len(b.logits), classes // units.classes, width // units.width)
        strides = (*a.strides(units), *b.strides(units))
        constants: dict[str, Any] = {
            "SOFT": soft, "NORMS": norms, "PRECISION": precision, "UNIT_C": units.classes, "UNIT_D": units.width,
            "BLOCK_A": choice.rows_a, "BLOCK_B": choice.rows_b, "BLOCK_C": CLASSES,
            "num_stages": choice.num_stages,
        }  # fmt: skip
        if most > 1:
            _sum_kernel[(tiles, most)](
                *sides, lams, sums, *sizes, class_parts, feature_parts, *strides, **constants,
                num_warps=_sum_warps(choice, precision),
            )  # fmt: skip
        _pair_kernel[(tiles,)](
            *sides, lams, lams if slots is None else slots, sums, inner, norm, *sizes, len(lams), most, *strides,
            **constants, GROUP=0 if slots is None else group, BIAS=bias, SEVERAL=len(lams) > 1, SPLIT=most > 1,
            num_warps=choice.num_warps,
        )  # fmt: skip
    return inner, norm


def mixed_alignment(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    u_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    u_b: Tensor,
    lams: Tensor,
    *,
    bias: bool,
    precision: str = "tf32x3",
    norms: bool = True,
) -> tuple[Tensor, Tensor]:
    """Inner products with a reference gradient, and norms, of all pairs' mixed last-layer gradients.

    The formula is that of :func:`gradmix.ops.mixed_alignment.mixed_alignment`. There are two launches or, if sums are
    split (:func:`parts`), three. Nothing waits for the device.

    Args:
        features_a: (N, d) float32, bfloat16 or float16.
        logits_a: (N, C), likewise.
        labels_a: (N,) int64 class indices in [0, C), or (N, C) floating-point label vectors; of the same kind on both
            sides.
        u_a: (N, C) float32, [h; 1] G^T, of magnitude below 1e18.
        features_b: (M, d).
        logits_b: (M, C).
        labels_b: (M,) or (M, C).
        u_b: (M, C).
        lams: (L,) float64 on the device of the others, mixing weights in [0, 1], read when the kernel runs.
        bias: whether the features have a 1 appended in the gradient's norm.
        precision: of the products, ``"ieee"``, ``"tf32x3"`` or ``"tf32"``.
        norms: whether norms are computed. Without, the features are not read, and of class indices one of four products
            over the classes is left out.

    Returns:
        ``(inner, norm)``, both (L, N, M) float32, the second empty (0,) without ``norms``. Pairs of a row with a NaN
        are NaN.

    Raises:
        ValueError: an unknown precision.
    """
    _check_precision(precision)
    same = features_a is features_b and logits_a is logits_b and labels_a is labels_b and u_a is u_b
    a = _rows(features_a, logits_a, labels_a, u_a)
    b = a if same else _rows(features_b, logits_b, labels_b, u_b)
    return _launch(a, b, lams.contiguous(), None, 1, bias, precision, norms)


def class_pair_sums(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    u: Tensor,
    lams: Tensor,
    rows: Tensor,
    group: int,
    *,
    bias: bool,
    precision: str = "tf32x3",
) -> tuple[Tensor, Tensor]:
    """Sums over groups of rows of what :func:`mixed_alignment` gives for their pairs, which are never written.

    With rows[s] the row in slot s, and group p made of the slots s with s // group = p,

        inner[l, p, q] = sum over slots s in p and t in q, both filled, with rows[s] != rows[t], of the pair's inner

    and likewise for the norms. The sums are the same, to the bit, in every run.

    Args:
        features: (N, d), as ``features_a`` of :func:`mixed_alignment`; so are the next three.
        logits: (N, C).
        labels: (N,) or (N, C).
        u: (N, C) float32.
        lams: (L,) float64, mixing weights in [0, 1].
        rows: (G * group,) int64, row index in [0, N) of every slot, or -1 where it is empty.
        group: slots of a group, a power of two up to 16.
        bias: whether the features have a 1 appended in the gradient's norm.
        precision: ``"ieee"``, ``"tf32x3"`` or ``"tf32"``.

    Returns:
        ``(inner, norm)``, both (L, G, G) float32; 0 for a pair of groups without a pair of rows.

    Raises:
        ValueError: an unknown precision, a group that is no power of two up to 16, or slots that are no whole groups.
    """
    _check_precision(precision)
    if not 1 <= group <= LARGEST_GROUP or group & (group - 1):
        raise ValueError(f"group: got {group}, expected a power of two up to {LARGEST_GROUP}")
    if len(rows) % group:
        raise ValueError(f"rows: got {len(rows)} slots, expected a multiple of the group of {group}")
    a = _rows(features, logits, labels, u)
    return _launch(a, a, lams.contiguous(), rows.contiguous(), group, bias, precision)


# ----------------------------------------------------------------------------------------------------- ahead of time


def variants() -> Iterator[Variant]:
    """The kernels of this module as they are worth compiling ahead of time."""
    for soft in (False, True):
        yield from (_row_variant(soft, norms) for norms in (True, False))
        for choice in SOFT if soft else HARD:
            yield _pair_variant(choice, soft)
            yield _pair_variant(choice, soft, norms=False)
            yield _pair_variant(choice, soft, several=True)
            yield _pair_variant(choice, soft, several=True, group=16)
        smallest = (SOFT if soft else HARD)[-1]  # as sums are split only where there are few tiles
        for norms in (True, False):
            yield _pair_variant(smallest, soft, norms=norms, role="sums")
            yield _pair_variant(smallest, soft, norms=norms, role="finish")
        for precision in ("ieee", "tf32"):
            yield _pair_variant(smallest, soft, precision=precision)
            yield _pair_variant(smallest, soft, precision=precision, role="sums")
    for role in ("whole", "sums"):
        yield _pair_variant(HARD[-1], soft=False, element="*bf16", role=role)
        yield _pair_variant(HARD[-1], soft=False, units=(1, 1), role=role)


def _side_types(soft: bool, last: str, element: str) -> Iterator[tuple[str, str]]:
    for side in "ab":
        yield from (
            (f"features_{side}", element),
            (f"logits_{side}", element),
            (f"labels_{side}", "*i64"),
            (f"t_{side}", "*fp32" if soft else "*i64"),
            (f"u_{side}", "*fp32"),
            (f"{last}_{side}", "*fp32"),
        )


def _row_variant(soft: bool, norms: bool) -> Variant:
    constants = {"SOFT": soft, "NORMS": norms, "UNIT_C": 8, "UNIT_D": 16, "ROWS": ROWS, "COLUMNS": COLUMNS}
    signature = dict(_side_types(soft, "out", "*fp32"))
    signature |= dict.fromkeys(("rows_a", "rows_b", "classes", "width", *_STRIDES), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"mixed_alignment rows, {'label vectors' if soft else 'class indices'}{'' if norms else ', no norms'}"
    return Variant(name, _row_kernel, signature, constants, ROW_WARPS, 3, max_registers=128)


def _pair_variant(
    choice: Configuration,
    soft: bool,
    *,
    role: str = "whole",
    several: bool = False,
    group: int = 0,
    precision: str = "tf32x3",
    element: str = "*fp32",
    norms: bool = True,
    units: tuple[int, int] = (8, 16),
) -> Variant:
    """The kernel of pairs as a whole, the one of the sums that are split, or that of pairs which finishes those."""
    constants: dict[str, Any] = {
        "SOFT": soft,
        "NORMS": norms,
        "PRECISION": precision,
        "UNIT_C": units[0],
        "UNIT_D": units[1],
        "BLOCK_A": choice.rows_a,
        "BLOCK_B": choice.rows_b,
        "BLOCK_C": CLASSES,
    }
    if role != "sums":
        constants |= {"GROUP": group, "BIAS": True, "SEVERAL": several, "SPLIT": role == "finish"}
    signature = dict(_side_types(soft, "statistics", element)) | {"lams": "*fp64"}
    if role == "sums":
        signature |= {"sums": "*fp32"}
        numbers = ("class_parts", "feature_parts")
    else:
        signature |= {"slots": "*i64", "sums": "*fp32", "inner_out": "*fp32", "norm_out": "*fp32"}
        numbers = ("count", "parts")
    signature |= dict.fromkeys((*_SIZES, *numbers, *_STRIDES), "i32") | dict.fromkeys(constants, "constexpr")
    traits = [
        f"mixed_alignment {'' if role == 'whole' else f'{role} of '}{choice.rows_a}x{choice.rows_b}",
        "label vectors" if soft else "class indices",
        precision,
        *(["several weights"] if several else []),
        *([f"groups of {group}"] if group else []),
        *(["bfloat16"] if element == "*bf16" else []),
        *([] if norms else ["no norms"]),
        *([] if units == (8, 16) else [f"units of {units[0]} and {units[1]}"]),
    ]
    return Variant(
        ", ".join(traits),
        _sum_kernel if role == "sums" else _pair_kernel,
        signature,
        constants,
        _sum_warps(choice, precision) if role == "sums" else choice.num_warps,
        choice.num_stages,
        max_shared=65_536,
        max_spills=choice.max_spills if role == "finish" or (role == "whole" and (norms or soft)) else 0,
    )
