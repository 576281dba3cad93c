"""SwiGLU and GEGLU on the GPU, in Triton. Equation: reference/gated_activation.py.

gate, up, y: [..., cols], one of float32, bfloat16, float16. Any strides; results are contiguous. One launch each way.
Saved for backward: gate and up alone.

    dgate = dy * up * act'(gate)
    dup = dy * act(gate)

Bytes moved, for n elements of s bytes: forward 3 n s, backward 5 n s.
"""

import torch
import triton
import triton.language as tl

from fastft_kernels._layout import matrix
from fastft_kernels.triton._activation import act

BLOCK = 1024  # elements of a row per program, 8 per thread: 16-byte accesses in half precision
WARPS = 4


@triton.jit
def forward_kernel(
    gate_ptr, gate_stride, up_ptr, up_stride, y_ptr, n_cols, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(n_cols, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask, other=0.0).to(tl.float32)
    value, _ = act(gate, ACTIVATION)
    tl.store(y_ptr + row * n_cols + cols, (value * up).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    dy_stride,
    gate_ptr,
    gate_stride,
    up_ptr,
    up_stride,
    dgate_ptr,
    dup_ptr,
    n_cols,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(n_cols, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask, other=0.0).to(tl.float32)
    value, slope = act(gate, ACTIVATION)
    out = row * n_cols + cols
    tl.store(dgate_ptr + out, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask)
    tl.store(dup_ptr + out, (dy * value).to(dup_ptr.dtype.element_ty), mask)


def forward(gate, up, activation):
    """y."""
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel():
        gate, up = _rows(gate, up)
        with torch.cuda.device_of(y):
            forward_kernel[_grid(gate)](
                gate,
                gate.stride(0),
                up,
                up.stride(0),
                y,
                gate.shape[1],
                activation,
                BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return y


def backward(dy, gate, up, activation):
    """(dgate, dup)."""
    dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
    if dgate.numel():
        dy, gate, up = _rows(dy, gate, up)
        with torch.cuda.device_of(dgate):
            backward_kernel[_grid(gate)](
                dy,
                dy.stride(0),
                gate,
                gate.stride(0),
                up,
                up.stride(0),
                dgate,
                dup,
                gate.shape[1],
                activation,
                BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return dgate, dup


def _rows(*tensors):
    """As matrices; as one long row where all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.reshape(1, -1) for t in tensors]
    return [matrix(t) for t in tensors]


def _grid(matrix):
    return (matrix.shape[0] * triton.cdiv(matrix.shape[1], BLOCK),)
