"""LayerNorm on the GPU, in Triton, with dropout and a residual in front. Equation: reference/layer_norm.py.

x, residual, h, y: [..., cols], one of float32, bfloat16, float16; weight, bias: [cols], both one of them; mean, rstd:
float32 [rows]. Any strides; results are contiguous. A program keeps its rows in registers, which limits the columns: to
MAX_COLS, and where the weight is trained to MAX_TRAINED_COLS.
Saved for backward: h (x itself without dropout and residual), mean and rstd; the mask is drawn again from the seed.

    dh += rstd * (g - mean(g) - xhat * mean(g * xhat))      with g = dy * weight, xhat = (h - mean) * rstd
    dresidual = dh,  dx = dh * keep / keep_probability
    dweight = sum over rows of dy * xhat,  dbias = sum over rows of dy

Bytes moved, for n elements of s bytes: forward 2 n s (4 n s with a residual, 3 n s with dropout alone), backward 3 n s (4 n s
with dropout and a residual), n s more with dh.
"""

import torch
import triton
import triton.language as tl

from fastft_kernels._layout import matrix
from fastft_kernels.reference._philox import drop_threshold, keep_scale
from fastft_kernels.triton._philox import keep_mask

# Columns, rounded up to a power of two -> rows and warps of a program: 16 elements per thread, no spills.
CONFIG = {
    64: (32, 4),
    128: (16, 4),
    256: (8, 4),
    512: (4, 4),
    1024: (2, 4),
    2048: (1, 4),
    4096: (1, 8),
    8192: (1, 16),
}
MAX_COLS = max(CONFIG)
MAX_TRAINED_COLS = 8192
PROGRAMS_PER_SM = 4  # of the backward pass with dweight: enough loads in flight, few partial sums


@triton.jit(do_not_specialize=["n_rows", "threshold", "seed"])
def forward_kernel(
    x_ptr,
    x_stride,
    residual_ptr,
    residual_stride,
    weight_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    n_cols,
    eps,
    threshold,
    scale,
    seed,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    out = rows[:, None] * n_cols + cols[None, :]

    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        keep = keep_mask(seed, rows, 0, n_cols, threshold, ALIGNED, BLOCK_ROWS, BLOCK_COLS)
        x = tl.where(keep, x * scale, 0.0)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + rows[:, None] * residual_stride + cols[None, :], mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL or HAS_DROPOUT:
        h = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + out, h, mask)
        x = h.to(tl.float32)
    mean = tl.sum(x, axis=1) / n_cols
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)
    tl.store(mean_ptr + rows, mean, rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, rows < n_rows)

    y = centred * rstd[:, None] * tl.load(weight_ptr + cols, cols < n_cols, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, cols < n_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n_rows", "threshold", "seed"])
def backward_kernel(
    dy_ptr,
    dy_stride,
    dh_ptr,
    dh_stride,
    h_ptr,
    h_stride,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    partial_ptr,
    n_rows,
    n_cols,
    threshold,
    scale,
    seed,
    HAS_DH: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    NEEDS_DRESIDUAL: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_COLS)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        out = rows[:, None] * n_cols + cols[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + rows[:, None] * h_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, rows < n_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, rows < n_rows, other=0.0)[:, None]

        # The weight is read again for each tile, from the cache, and dy is done with early: registers are short.
        weight = tl.load(weight_ptr + cols[None, :], (cols < n_cols)[None, :], other=0.0).to(tl.float32)
        xhat = tl.where(mask, (h - mean) * rstd, 0.0)
        if NEEDS_DWEIGHT:
            dweight += dy * xhat
        if NEEDS_DBIAS:
            dbias += dy
        g = dy * weight
        dh = rstd * (g - (tl.sum(g, axis=1) / n_cols)[:, None] - xhat * (tl.sum(g * xhat, axis=1) / n_cols)[:, None])
        if HAS_DH:
            dh += tl.load(dh_ptr + rows[:, None] * dh_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        if NEEDS_DRESIDUAL:
            tl.store(dresidual_ptr + out, dh.to(dresidual_ptr.dtype.element_ty), mask)
        if HAS_DROPOUT:
            keep = keep_mask(seed, rows, 0, n_cols, threshold, ALIGNED, BLOCK_ROWS, BLOCK_COLS)
            dh = tl.where(keep, dh * scale, 0.0)
        tl.store(dx_ptr + out, dh.to(dx_ptr.dtype.element_ty), mask)
    place = tl.program_id(0).to(tl.int64) * n_cols + cols
    if NEEDS_DWEIGHT:
        tl.store(partial_ptr + place, tl.sum(dweight, axis=0), cols < n_cols)
    if NEEDS_DBIAS:
        place += tl.num_programs(0).to(tl.int64) * n_cols
        tl.store(partial_ptr + place, tl.sum(dbias, axis=0), cols < n_cols)


def forward(x, weight, bias, eps, residual, dropout_p, seed):
    """(y, h, mean, rstd); h is None where it is x. dropout_p is 0 or at least 2^-16."""
    rows = matrix(x)
    added = rows if residual is None else matrix(residual)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None if residual is None and not dropout_p else torch.empty_like(y)
    mean, rstd = (x.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(2))
    if y.numel() == 0:
        return y, h, mean, rstd
    block_cols, block_rows, warps = _config(rows.shape[1])
    weight = weight.contiguous()
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(rows.shape[0], block_rows),)](
            rows,
            rows.stride(0),
            added,
            added.stride(0),
            weight,
            weight if bias is None else bias.contiguous(),
            y,
            y if h is None else h,
            mean,
            rstd,
            *rows.shape,
            eps,
            *_dropout(dropout_p, seed),
            HAS_RESIDUAL=residual is not None,
            HAS_DROPOUT=dropout_p > 0,
            HAS_BIAS=bias is not None,
            ALIGNED=rows.shape[1] % 8 == 0,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return y, h, mean, rstd


def backward(dy, dh, h, weight, mean, rstd, dropout_p, seed, needs_dresidual, needs_dweight, needs_dbias):
    """(dx, dresidual, dweight, dbias), the latter three None unless asked for; dh is None where nothing else needs h.

    dresidual is dx itself where nothing was dropped.
    """
    rows = matrix(h)
    g = matrix(dy)
    through = g if dh is None else matrix(dh)
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dresidual = torch.empty_like(dx) if needs_dresidual and dropout_p else None
    summed = needs_dweight or needs_dbias
    block_cols, block_rows, warps = _config(rows.shape[1]) if dx.numel() else (64, 1, 4)
    programs = triton.cdiv(rows.shape[0], block_rows)
    if summed:
        programs = min(programs, PROGRAMS_PER_SM * _multiprocessors(h.device))
    partial = rstd.new_empty(2, programs, rows.shape[1]) if summed else rstd
    if dx.numel():
        with torch.cuda.device_of(h):
            backward_kernel[(programs,)](
                g,
                g.stride(0),
                through,
                through.stride(0),
                rows,
                rows.stride(0),
                weight.contiguous(),
                mean,
                rstd,
                dx,
                dx if dresidual is None else dresidual,
                partial,
                *rows.shape,
                *_dropout(dropout_p, seed),
                HAS_DH=dh is not None,
                HAS_DROPOUT=dropout_p > 0,
                NEEDS_DRESIDUAL=dresidual is not None,
                NEEDS_DWEIGHT=needs_dweight,
                NEEDS_DBIAS=needs_dbias,
                ALIGNED=rows.shape[1] % 8 == 0,
                BLOCK_ROWS=block_rows,
                BLOCK_COLS=block_cols,
                num_warps=warps,
                enable_fp_fusion=True,
            )
    else:
        partial = torch.zeros_like(partial)
    dweight = partial[0].sum(0).to(weight.dtype) if needs_dweight else None
    dbias = partial[1].sum(0).to(weight.dtype) if needs_dbias else None
    return dx, dx if needs_dresidual and not dropout_p else dresidual, dweight, dbias


def _config(cols):
    """(BLOCK_COLS, BLOCK_ROWS, warps) for rows of `cols` elements."""
    block_cols = max(min(CONFIG), triton.next_power_of_2(cols))
    return block_cols, *CONFIG[block_cols]


def _dropout(p, seed):
    return drop_threshold(p), keep_scale(p), int(seed) if p else 0


def _multiprocessors(device):
    """How many programs run side by side; under the interpreter any number would do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
