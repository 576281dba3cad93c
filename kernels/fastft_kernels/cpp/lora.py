"""What LoRA needs besides matrix products on the CPU: Python face of csrc/cpu/lora.cpp.

Bytes moved, for n elements of s bytes: 2 n s; the mask costs about 13 integer operations for each element.
"""

import torch

from fastft_kernels.cpp.extension import DTYPES, C, address
from fastft_kernels.reference._philox import drop_threshold


def apply_mask(x, p, seed):
    """x, contiguous, where `seed` keeps it, else 0: reference/lora.py."""
    x = x.contiguous()
    y = torch.empty_like(x)
    C.lora_apply_mask(
        address(x),
        address(y),
        x.numel(),
        seed % 2**64,
        drop_threshold(p),
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return y
