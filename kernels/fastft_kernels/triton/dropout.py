"""Dropout on the GPU, in Triton. Equation: reference/dropout.py; the mask: reference/_philox.py.

x, y: any shape, one of float32, bfloat16, float16. Any strides; y is contiguous. Nothing is saved but the seed.

Bytes moved, for n elements of s bytes: 2 n s each way. A thread draws one counter for eight neighbours.
"""

import torch
import triton
import triton.language as tl

from fastft_kernels.reference._philox import drop_threshold, keep_scale
from fastft_kernels.triton._philox import aligned_draws

BLOCK = 2048
WARPS = 4


@triton.jit(do_not_specialize=["n", "threshold", "seed"])
def dropout_kernel(x_ptr, y_ptr, n, threshold, scale, seed, BLOCK: tl.constexpr):
    counter = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    keep = aligned_draws(seed, counter).reshape([BLOCK]) >= threshold
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element, element < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + element, tl.where(keep, x * scale, 0.0).to(y_ptr.dtype.element_ty), element < n)


def dropout(x, p, seed):
    """y; the gradient of x is the same function of the gradient of y."""
    return scaled(x, p, seed, keep_scale(p))


def scaled(x, p, seed, scale):
    """x * scale where `seed` keeps it, else 0."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            dropout_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x,
                y,
                x.numel(),
                drop_threshold(p),
                scale,
                int(seed),
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return y
