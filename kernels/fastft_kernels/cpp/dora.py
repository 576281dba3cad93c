"""The rows' magnitudes of DoRA on the CPU: Python face of csrc/cpu/dora.cpp. Equations: reference/dora.py.

z, u, dy: [..., cols], one of float32, bfloat16, float16, any strides; gains: float32 [cols]. Results are contiguous. The
numbers do not depend on the thread count or the instruction set.

Bytes moved, for n elements of s bytes: forward 2 n s, or 3 n s with u; backward 3 n s.
"""

import torch

from fastft_kernels._layout import matrix
from fastft_kernels.cpp.extension import DTYPES, C, address, row_stride


def forward(z, gain, bias, u=None, gain_u=None):
    """y."""
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    z, u, bias = matrix(z), None if u is None else matrix(u), None if bias is None else bias.contiguous()
    C.dora_forward(
        address(z),
        row_stride(z),
        address(gain),
        address(u),
        row_stride(u),
        address(gain_u),
        address(bias),
        address(y),
        *z.shape,
        DTYPES[z.dtype],
        DTYPES[z.dtype if bias is None else bias.dtype],
        torch.get_num_threads(),
    )
    return y


def backward(dy, z, gain, needs_dbias):
    """(dz, dgain, dbias); dgain is None where z is, dbias unless asked for."""
    dy, z = matrix(dy), None if z is None else matrix(z)
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format)
    dgain, dbias = None if z is None else torch.empty_like(gain), torch.empty_like(gain) if needs_dbias else None
    C.dora_backward(
        address(dy),
        row_stride(dy),
        address(z),
        row_stride(z),
        address(gain),
        address(dz),
        address(dgain),
        address(dbias),
        *dy.shape,
        DTYPES[dy.dtype],
        torch.get_num_threads(),
    )
    return dz, dgain, dbias
