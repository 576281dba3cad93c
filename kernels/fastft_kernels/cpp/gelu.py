"""GELU on the CPU, with a bias that is added first: Python face of csrc/cpu/gelu.cpp. Equation: reference/gelu.py.

x, y: [..., cols], one of float32, bfloat16, float16; bias: [cols], any of them. Any strides; results are contiguous. Saved
for backward: x and bias alone. The numbers do not depend on the thread count or the instruction set.

Bytes moved, for n elements of s bytes: forward 2 n s, backward 3 n s.
"""

import torch

from fastft_kernels._layout import matrix
from fastft_kernels.cpp.extension import DTYPES, C, address, row_stride
from fastft_kernels.reference.gated_activation import ACTIVATIONS as CODES
from fastft_kernels.reference.gelu import ACTIVATIONS


def forward(x, bias, approximate):
    """y."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, bias = matrix(x), None if bias is None else bias.contiguous()
    C.gelu_forward(
        address(x),
        row_stride(x),
        address(bias),
        address(y),
        *x.shape,
        CODES.index(ACTIVATIONS[approximate]),
        DTYPES[x.dtype],
        DTYPES[x.dtype if bias is None else bias.dtype],
        torch.get_num_threads(),
    )
    return y


def backward(dy, x, bias, approximate, needs_dbias):
    """(dx, dbias); dbias is None unless asked for."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dy, x, bias = matrix(dy), matrix(x), None if bias is None else bias.contiguous()
    dbias = torch.empty_like(bias) if needs_dbias else None
    C.gelu_backward(
        address(dy),
        row_stride(dy),
        address(x),
        row_stride(x),
        address(bias),
        address(dx),
        address(dbias),
        *x.shape,
        CODES.index(ACTIVATIONS[approximate]),
        DTYPES[x.dtype],
        DTYPES[x.dtype if bias is None else bias.dtype],
        torch.get_num_threads(),
    )
    return dx, dbias
