"""SwiGLU and GEGLU on the CPU: Python face of csrc/cpu/gated_activation.cpp. Equation: reference/gated_activation.py.

gate, up, y: [..., cols], one of float32, bfloat16, float16. Any strides; results are contiguous. Saved for backward: gate
and up alone. The numbers do not depend on the thread count or the instruction set.

Bytes moved, for n elements of s bytes: forward 3 n s, backward 5 n s.
"""

import torch

from fastft_kernels._layout import matrix
from fastft_kernels.cpp.extension import DTYPES, C, address, row_stride
from fastft_kernels.reference.gated_activation import ACTIVATIONS


def forward(gate, up, activation):
    """y."""
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate, up = matrix(gate), matrix(up)
    C.gated_activation_forward(
        address(gate),
        row_stride(gate),
        address(up),
        row_stride(up),
        address(y),
        *gate.shape,
        ACTIVATIONS.index(activation),
        DTYPES[gate.dtype],
        torch.get_num_threads(),
    )
    return y


def backward(dy, gate, up, activation):
    """(dgate, dup)."""
    dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
    dy, gate, up = matrix(dy), matrix(gate), matrix(up)
    C.gated_activation_backward(
        address(dy),
        row_stride(dy),
        address(gate),
        row_stride(gate),
        address(up),
        row_stride(up),
        address(dgate),
        address(dup),
        *gate.shape,
        ACTIVATIONS.index(activation),
        DTYPES[gate.dtype],
        torch.get_num_threads(),
    )
    return dgate, dup
