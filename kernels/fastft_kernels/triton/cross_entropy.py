"""Cross-entropy on the GPU, in Triton. Equation: reference/cross_entropy.py.

logits: [rows, cols], one of float32, bfloat16, float16, adjacent elements in a row; overwritten by their gradient.
A program does one row, in two passes over blocks of columns: the sums (kept relative to the largest value so far), then
the gradient. The second pass finds the row in the L2 cache.

Bytes moved, for n elements of s bytes: n s, and with the gradient 2 n s.
"""

import torch
import triton
import triton.language as tl

MAX_BLOCK = 8192
WARPS = 16  # of the largest block: 16 elements per thread


@triton.jit
def _tanh(x):
    # The polynomial near zero keeps the relative accuracy that the quotient loses there.
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    s = x * x
    p = ((((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s) - (
        3.33332819422e-1
    )
    y = tl.where(magnitude < 0.625, p * s * magnitude + magnitude, large)
    return tl.where(x < 0, -y, y)


@triton.jit
def forward_kernel(
    logits_ptr,
    stride,
    labels_ptr,
    scale_ptr,
    loss_ptr,
    log_prob_ptr,
    correct_ptr,
    entropy_ptr,
    n_cols,
    ignore_index,
    smoothing,
    softcap,
    z_loss,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    x_ptr = logits_ptr + row * stride
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(log_prob_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(correct_ptr + row, 0)
        if NEEDS_GRADIENT:
            for start in range(0, n_cols, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                tl.store(x_ptr + cols, tl.zeros([BLOCK], x_ptr.dtype.element_ty), cols < n_cols)
    else:
        top = tl.full([], float("-inf"), tl.float32)
        first = tl.full([], 0, tl.int32)
        exps = tl.zeros([], tl.float32)
        products = tl.zeros([], tl.float32)
        values = tl.zeros([], tl.float32)
        for start in range(0, n_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < n_cols
            z = tl.load(x_ptr + cols, mask, other=float("-inf")).to(tl.float32)
            if HAS_SOFTCAP:
                z = tl.where(mask, softcap * _tanh(z / softcap), float("-inf"))
            largest = tl.max(z, axis=0)
            if largest > top:
                first = tl.min(tl.where(z == largest, cols, n_cols), axis=0)
            new_top = tl.maximum(top, largest)
            # While there is nothing but -inf, nothing is to be rescaled: -inf - -inf would be NaN.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.where(top == float("-inf"), 0.0, tl.exp(top - base))
            shift = tl.where(top == float("-inf"), 0.0, top - base)
            below = z - base
            e = tl.exp(below)
            products = shrink * (products + shift * exps) + tl.sum(tl.where(e > 0, e * below, 0.0), axis=0)
            exps = shrink * exps + tl.sum(e, axis=0)
            values += tl.sum(tl.where(mask, z, 0.0), axis=0)
            top = new_top

        inside = (label >= 0) & (label < n_cols)
        at = tl.where(inside, label, 0)
        target = tl.load(x_ptr + at).to(tl.float32)
        if HAS_SOFTCAP:
            target = softcap * _tanh(target / softcap)
        log_sum = tl.log(exps)
        lse = top + log_sum
        log_prob = tl.where(inside, (target - top) - log_sum, float("nan"))
        loss = -log_prob
        if smoothing != 0.0:
            loss = (1.0 - smoothing) * loss + smoothing * (lse - values / n_cols)
        if z_loss != 0.0:
            loss += z_loss * lse * lse
        tl.store(loss_ptr + row, loss)
        tl.store(log_prob_ptr + row, log_prob)
        tl.store(entropy_ptr + row, log_sum - products / exps)
        tl.store(correct_ptr + row, (first == label) & (exps == exps))

        if NEEDS_GRADIENT:
            # Everybody has read the target before anybody overwrites it.
            tl.debug_barrier()
            by = 1.0
            if HAS_SCALE:
                by = tl.load(scale_ptr + row)
            share = (1.0 + 2.0 * z_loss * lse) / exps
            for start in range(0, n_cols, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                mask = cols < n_cols
                z = tl.load(x_ptr + cols, mask, other=0.0).to(tl.float32)
                slope = by
                if HAS_SOFTCAP:
                    t = _tanh(z / softcap)
                    z = softcap * t
                    slope = by * (1.0 - t * t)
                wanted = smoothing / n_cols + tl.where(cols == at, 1.0 - smoothing, 0.0)
                g = (tl.exp(z - top) * share - wanted) * slope
                tl.store(x_ptr + cols, g.to(x_ptr.dtype.element_ty), mask)


def forward(logits, labels, scale, ignore_index, label_smoothing, softcap, z_loss, needs_gradient):
    """(loss, log_prob, correct, entropy), and `logits` become their gradient, where asked for."""
    rows, cols = logits.shape
    loss, log_prob, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    correct = logits.new_empty(rows, dtype=torch.bool)
    if rows == 0:
        return loss, log_prob, correct, entropy
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(cols)))
    with torch.cuda.device_of(logits):
        forward_kernel[(rows,)](
            logits,
            logits.stride(0),
            labels.contiguous(),
            loss if scale is None else scale.contiguous(),
            loss,
            log_prob,
            correct,
            entropy,
            cols,
            ignore_index,
            float(label_smoothing),
            float(softcap or 0.0),
            float(z_loss),
            HAS_SCALE=scale is not None,
            HAS_SOFTCAP=softcap is not None,
            NEEDS_GRADIENT=needs_gradient,
            BLOCK=block,
            num_warps=max(1, min(WARPS, block // 512)),
            enable_fp_fusion=True,
        )
    return loss, log_prob, correct, entropy
