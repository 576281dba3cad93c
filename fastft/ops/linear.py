"""A linear layer, y = x Wᵀ + b, that is never slow for want of half-precision arithmetic.

PyTorch computes it, except in half precision on a CPU that has no instructions for that dtype: there the product is taken
in fp32 (see fastft_kernels.reference.linear).
"""

import functools

import torch
import torch.nn.functional as F

from fastft_kernels.reference.linear import linear as widened


def linear(x, weight, bias=None):
    """x: [..., in]; weight: [out, in]; bias: [out] or None. Returns [..., out] in x's dtype."""
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not native(x.dtype)
        and not torch.is_autocast_enabled("cpu")
    ):
        return widened(x, weight, bias)
    return F.linear(x, weight, bias)


@functools.cache
def native(dtype):
    """Whether this CPU has instructions for products in `dtype`."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True
