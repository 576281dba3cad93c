"""LayerNorm on the CPU, with dropout and a residual in front: Python face of csrc/cpu/layer_norm.cpp.

Equation and rounding: reference/layer_norm.py. x, residual, h, y: [..., cols], one of float32, bfloat16, float16; weight,
bias: [cols], both one of them; mean, rstd: float32 [rows]. Any strides; results are contiguous.
Saved for backward: h (x itself without dropout and residual), mean and rstd; the mask is drawn again from the seed.
The numbers do not depend on the thread count or the instruction set.

Bytes moved, for n elements of s bytes: forward 2 n s (4 n s with a residual, 3 n s with dropout alone), backward 3 n s (4 n s
with dropout and a residual), n s more with dh.
"""

import torch

from fastft_kernels._layout import matrix
from fastft_kernels.cpp.extension import DTYPES, C, address, row_stride
from fastft_kernels.reference._philox import drop_threshold, keep_scale


def forward(x, weight, bias, eps, residual, dropout_p, seed):
    """(y, h, mean, rstd); h is None where it is x. dropout_p is 0 or at least 2^-16."""
    rows = matrix(x)
    added = None if residual is None else matrix(residual)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None if residual is None and not dropout_p else torch.empty_like(y)
    mean, rstd = (x.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(2))
    C.layer_norm_forward(
        address(rows),
        row_stride(rows),
        address(added),
        row_stride(added),
        address(weight),
        address(bias),
        address(y),
        address(h),
        address(mean),
        address(rstd),
        *rows.shape,
        eps,
        *_dropout(dropout_p, seed),
        DTYPES[x.dtype],
        DTYPES[weight.dtype],
        torch.get_num_threads(),
    )
    return y, h, mean, rstd


def backward(dy, dh, h, weight, mean, rstd, dropout_p, seed, needs_dresidual, needs_dweight, needs_dbias):
    """(dx, dresidual, dweight, dbias), the latter three None unless asked for; dh is None where nothing else needs h.

    dresidual is dx itself where nothing was dropped.
    """
    g = matrix(dy)
    through = None if dh is None else matrix(dh)
    rows = matrix(h)
    weight = weight.contiguous()
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dropped = dropout_p > 0
    dresidual = torch.empty_like(dx) if needs_dresidual and dropped else None
    dweight = torch.empty_like(weight) if needs_dweight else None
    dbias = torch.empty_like(weight) if needs_dbias else None
    C.layer_norm_backward(
        address(g),
        row_stride(g),
        address(through),
        row_stride(through),
        address(rows),
        row_stride(rows),
        address(weight),
        address(mean),
        address(rstd),
        address(dx),
        address(dresidual),
        address(dweight),
        address(dbias),
        *rows.shape,
        *_dropout(dropout_p, seed),
        DTYPES[h.dtype],
        DTYPES[weight.dtype],
        torch.get_num_threads(),
    )
    return dx, dx if needs_dresidual and not dropped else dresidual, dweight, dbias


def _dropout(p, seed):
    return drop_threshold(p), keep_scale(p), int(seed) if p else 0
