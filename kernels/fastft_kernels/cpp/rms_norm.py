"""RMSNorm on the CPU: Python face of csrc/cpu/rms_norm.cpp. Equation and rounding: reference/rms_norm.py.

x, residual, h, y: [..., cols], one of float32, bfloat16, float16; weight: [cols], any of them; rstd: float32 [rows].
Any strides; results are contiguous. Saved for backward: h (x itself without a residual) and rstd.
The numbers do not depend on the thread count or the instruction set.

Bytes moved, for n elements of s bytes: forward 2 n s (4 n s with a residual), backward 3 n s (4 n s with dh).
"""

import torch

from fastft_kernels._layout import matrix
from fastft_kernels.cpp.extension import DTYPES, C, address, row_stride


def forward(x, weight, eps, offset, residual):
    """(y, h, rstd); h is None without a residual."""
    rows = matrix(x)
    added = None if residual is None else matrix(residual)
    weight = weight.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None if residual is None else torch.empty_like(y)
    rstd = x.new_empty(rows.shape[0], dtype=torch.float32)
    C.rms_norm_forward(
        address(rows),
        row_stride(rows),
        address(added),
        row_stride(added),
        address(weight),
        address(y),
        address(h),
        address(rstd),
        *rows.shape,
        eps,
        offset,
        DTYPES[x.dtype],
        DTYPES[weight.dtype],
        torch.get_num_threads(),
    )
    return y, h, rstd


def backward(dy, dh, h, weight, rstd, offset, needs_dweight):
    """(dx, dweight); dh is None where nothing else depends on h; dweight is None unless asked for."""
    g = matrix(dy)
    through = None if dh is None else matrix(dh)
    rows = matrix(h)
    weight = weight.contiguous()
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight) if needs_dweight else None
    C.rms_norm_backward(
        address(g),
        row_stride(g),
        address(through),
        row_stride(through),
        address(rows),
        row_stride(rows),
        address(weight),
        address(rstd),
        address(dx),
        address(dweight),
        *rows.shape,
        offset,
        DTYPES[h.dtype],
        DTYPES[weight.dtype],
        torch.get_num_threads(),
    )
    return dx, dweight
