"""GELU on the GPU, with a bias that is added first, in Triton. Equation: reference/gelu.py.

x, y: [..., cols], one of float32, bfloat16, float16; bias: [cols], any of them. Any strides; results are contiguous.
Saved for backward: x and bias alone.

    dx = dy * gelu'(x + bias)
    dbias = sum over rows of dx

One launch each way; where the bias is trained a program of the backward pass does every so many tiles of its columns and
leaves one partial sum, and a second, small launch adds these up in a fixed order.
Bytes moved, for n elements of s bytes: forward 2 n s, backward 3 n s.
"""

import torch
import triton
import triton.language as tl

from fastft_kernels._layout import matrix
from fastft_kernels.reference.gelu import ACTIVATIONS
from fastft_kernels.triton._activation import act

TILE = 1024  # elements per program, 8 per thread: 16-byte accesses in half precision
MAX_COLS, MIN_COLS = 1024, 64  # of a tile
WARPS = 4
PROGRAMS_PER_SM = 8  # of the backward pass with dbias: enough loads in flight, few partial sums


@triton.jit
def forward_kernel(
    x_ptr,
    x_stride,
    bias_ptr,
    y_ptr,
    n_rows,
    n_cols,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    blocks = tl.cdiv(n_cols, BLOCK_COLS)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    h = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + cols, cols < n_cols, other=0.0).to(tl.float32)[None, :]
    y, _ = act(h, ACTIVATION)
    tl.store(y_ptr + rows[:, None] * n_cols + cols[None, :], y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    dy_stride,
    x_ptr,
    x_stride,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    n_rows,
    n_cols,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    blocks = tl.cdiv(n_cols, BLOCK_COLS)
    lane = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in range(lane, tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0) // blocks):
        rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        h = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            h += tl.load(bias_ptr + cols, cols < n_cols, other=0.0).to(tl.float32)[None, :]
        _, slope = act(h, ACTIVATION)
        dx = dy * slope
        if NEEDS_DBIAS:
            dbias += dx
        tl.store(dx_ptr + rows[:, None] * n_cols + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask)
    if NEEDS_DBIAS:
        tl.store(partial_ptr + lane.to(tl.int64) * n_cols + cols, tl.sum(dbias, axis=0), cols < n_cols)


def forward(x, bias, approximate):
    """y."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    x = matrix(x)
    block_rows, block_cols = tile_of(x.shape[1])
    with torch.cuda.device_of(y):
        forward_kernel[(triton.cdiv(x.shape[0], block_rows) * triton.cdiv(x.shape[1], block_cols),)](
            x,
            x.stride(0),
            x if bias is None else bias.contiguous(),
            y,
            *x.shape,
            ACTIVATION=ACTIVATIONS[approximate],
            HAS_BIAS=bias is not None,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return y


def backward(dy, x, bias, approximate, needs_dbias):
    """(dx, dbias); dbias is None unless asked for."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx, torch.zeros_like(bias) if needs_dbias else None
    dy, x = matrix(dy), matrix(x)
    block_rows, block_cols = tile_of(x.shape[1])
    lanes, blocks = triton.cdiv(x.shape[0], block_rows), triton.cdiv(x.shape[1], block_cols)
    partial = dx
    if needs_dbias:
        lanes = min(lanes, max(1, PROGRAMS_PER_SM * _multiprocessors(dx.device) // blocks))
        partial = x.new_empty(lanes, x.shape[1], dtype=torch.float32)
    with torch.cuda.device_of(dx):
        backward_kernel[(lanes * blocks,)](
            dy,
            dy.stride(0),
            x,
            x.stride(0),
            x if bias is None else bias.contiguous(),
            dx,
            partial,
            *x.shape,
            ACTIVATION=ACTIVATIONS[approximate],
            HAS_BIAS=bias is not None,
            NEEDS_DBIAS=needs_dbias,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return dx, partial.sum(0).to(bias.dtype) if needs_dbias else None


def tile_of(cols):
    """(BLOCK_ROWS, BLOCK_COLS) for rows of `cols` elements."""
    block_cols = max(MIN_COLS, min(MAX_COLS, triton.next_power_of_2(cols)))
    return TILE // block_cols, block_cols


def _multiprocessors(device):
    """How many programs run side by side; under the interpreter any number would do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
