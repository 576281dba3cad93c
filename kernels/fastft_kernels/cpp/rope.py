"""Rotary position embedding on the CPU: Python face of csrc/cpu/rope.cpp. Equation: reference/rope.py.

q, k: [..., D], one of float32, bfloat16, float16; cos, sin: without the heads and with [..., R], any of them. Any strides;
results lie in memory as q and k do, the elements of a head side by side. q and k are turned in one pass.
Saved for backward, which is the transposed rotation: cos and sin alone.
The numbers do not depend on the thread count or the instruction set.

Bytes moved, for n elements of s bytes in q and k together: 2 n s each way; cos and sin are read once for all heads.
"""

from array import array

import torch

from fastft_kernels._layout import angle_strides, rows, token_dim, token_strides
from fastft_kernels.cpp.extension import DTYPES, C, address


def forward(q, k, cos, sin, unsqueeze_dim):
    """(q, k), turned."""
    return _turn(q, k, cos, sin, unsqueeze_dim, False)


def backward(dq, dk, cos, sin, unsqueeze_dim):
    """(dq, dk), turned back."""
    return _turn(dq, dk, cos, sin, unsqueeze_dim, True)


def _turn(q, k, cos, sin, head_dim, inverse):
    q, k, cos, sin = (rows(x) for x in (q, k, cos, sin))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    shape = _shape(q, k, q_out, k_out, cos, sin, head_dim)
    C.rope(
        shape.buffer_info()[0],
        address(q),
        address(k),
        address(cos),
        address(sin),
        address(q_out),
        address(k_out),
        inverse,
        DTYPES[q.dtype],
        DTYPES[cos.dtype],
        torch.get_num_threads(),
    )
    return q_out, k_out


def _shape(q, k, q_out, k_out, cos, sin, head_dim):
    """RopeShape of csrc/cpu/rope.h."""
    batch = q.shape[0] if q.dim() == 4 else 1
    numbers = array("q", (batch, q.shape[token_dim(q, head_dim)], q.shape[head_dim], k.shape[head_dim]))
    numbers.extend((q.shape[-1], cos.shape[-1] // 2))
    for x in (q, k, q_out, k_out):
        numbers.extend(token_strides(x, head_dim))
    for x in (cos, sin):
        numbers.extend(angle_strides(x))
    return numbers
