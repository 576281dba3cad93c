"""RMSNorm on the GPU, in Triton. Equation and rounding: reference/rms_norm.py.

x, residual, h, y: [..., cols], one of float32, bfloat16, float16; weight: [cols], any of them; rstd: float32 [rows].
Any strides; results are contiguous. A program keeps its rows in registers, which limits the columns: to MAX_COLS, and
where the weight is trained to MAX_TRAINED_COLS.
Saved for backward: h (x itself without a residual) and rstd.

    dx = g - xhat * mean(g * xhat) + dh               with g = dy * (offset + weight) * rstd, xhat = h * rstd
    dweight = sum over rows of dy * xhat

Bytes moved, for n elements of s bytes: forward 2 n s (4 n s with a residual), backward 3 n s (4 n s with dh).
"""

import torch
import triton
import triton.language as tl

from fastft_kernels._layout import matrix

# Columns, rounded up to a power of two -> rows and warps of a program: 16 to 32 elements per thread, no spills.
CONFIG = {
    64: (32, 4),
    128: (16, 4),
    256: (8, 4),
    512: (4, 4),
    1024: (2, 4),
    2048: (1, 4),
    4096: (1, 8),
    8192: (1, 16),
    16384: (1, 16),
}
MAX_COLS = max(CONFIG)
MAX_TRAINED_COLS = 8192
PROGRAMS_PER_SM = 4  # of the backward pass with dweight: enough loads in flight, few partial sums


@triton.jit(do_not_specialize=["n_rows"])
def forward_kernel(
    x_ptr,
    x_stride,
    residual_ptr,
    residual_stride,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    n_rows,
    n_cols,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    out = rows[:, None] * n_cols + cols[None, :]

    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + rows[:, None] * residual_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        h = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + out, h, mask)
        x = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / n_cols + eps)
    tl.store(rstd_ptr + rows, rstd, rows < n_rows)

    y = x * rstd[:, None]
    if ROUND_FIRST:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    scale = offset + tl.load(weight_ptr + cols, cols < n_cols, other=0.0).to(tl.float32)
    tl.store(y_ptr + out, (y * scale[None, :]).to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n_rows"])
def backward_kernel(
    dy_ptr,
    dy_stride,
    dh_ptr,
    dh_stride,
    h_ptr,
    h_stride,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    n_rows,
    n_cols,
    offset,
    HAS_DH: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_COLS)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + rows[:, None] * h_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, rows < n_rows, other=0.0)[:, None]

        # The weight is read again for each tile, from the cache, and dy is done with early: registers are short.
        scale = offset + tl.load(weight_ptr + cols[None, :], (cols < n_cols)[None, :], other=0.0).to(tl.float32)
        xhat = h * rstd
        if NEEDS_DWEIGHT:
            dweight += dy * xhat
        g = dy * scale * rstd
        dx = g - xhat * (tl.sum(g * xhat, axis=1) / n_cols)[:, None]
        if HAS_DH:
            dx += tl.load(dh_ptr + rows[:, None] * dh_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * n_cols + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask)
    if NEEDS_DWEIGHT:
        partial = tl.sum(dweight, axis=0)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * n_cols + cols, partial, cols < n_cols)


def forward(x, weight, eps, offset, residual):
    """(y, h, rstd); h is None without a residual."""
    rows = matrix(x)
    added = rows if residual is None else matrix(residual)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None if residual is None else torch.empty_like(y)
    rstd = x.new_empty(rows.shape[0], dtype=torch.float32)
    if y.numel() == 0:
        return y, h, rstd
    block_cols, block_rows, warps = _config(rows.shape[1])
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(rows.shape[0], block_rows),)](
            rows,
            rows.stride(0),
            added,
            added.stride(0),
            weight.contiguous(),
            y,
            y if h is None else h,
            rstd,
            *rows.shape,
            eps,
            offset,
            HAS_RESIDUAL=residual is not None,
            ROUND_FIRST=offset == 0,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return y, h, rstd


def backward(dy, dh, h, weight, rstd, offset, needs_dweight):
    """(dx, dweight); dh is None where nothing else depends on h; dweight is None unless asked for."""
    rows = matrix(h)
    g = matrix(dy)
    through = g if dh is None else matrix(dh)
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight) if needs_dweight else None
    block_cols, block_rows, warps = _config(rows.shape[1])
    programs = triton.cdiv(rows.shape[0], block_rows)
    partial = rstd
    if needs_dweight:
        programs = min(programs, PROGRAMS_PER_SM * _multiprocessors(h.device))
        partial = rstd.new_empty(programs, rows.shape[1])
    with torch.cuda.device_of(h):
        backward_kernel[(programs,)](
            g,
            g.stride(0),
            through,
            through.stride(0),
            rows,
            rows.stride(0),
            weight.contiguous(),
            rstd,
            dx,
            partial,
            *rows.shape,
            offset,
            HAS_DH=dh is not None,
            NEEDS_DWEIGHT=needs_dweight,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return dx, partial.sum(0).to(weight.dtype) if needs_dweight else None


def _config(cols):
    """(BLOCK_COLS, BLOCK_ROWS, warps) for rows of `cols` elements."""
    block_cols = max(min(CONFIG), triton.next_power_of_2(cols))
    return block_cols, *CONFIG[block_cols]


def _multiprocessors(device):
    """How many programs run side by side; under the interpreter any number would do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
