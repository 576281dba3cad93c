"""Dropout on the CPU: Python face of csrc/cpu/dropout.cpp. Equation: reference/dropout.py; the mask: reference/_philox.py.

x, y: any shape, one of float32, bfloat16, float16. Any strides; y is contiguous. Nothing is saved but the seed.
The numbers do not depend on the thread count or the instruction set.

Bytes moved, for n elements of s bytes: 2 n s each way.
"""

import torch

from fastft_kernels.cpp.extension import DTYPES, C, address
from fastft_kernels.reference._philox import drop_threshold, keep_scale


def dropout(x, p, seed):
    """y; the gradient of x is the same function of the gradient of y."""
    x = x.contiguous()
    y = torch.empty_like(x)
    C.dropout(
        address(x),
        address(y),
        x.numel(),
        drop_threshold(p),
        keep_scale(p),
        int(seed),
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return y
