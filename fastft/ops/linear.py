"""A linear layer, y = x Wᵀ + b, that is never slow for want of half-precision arithmetic.

PyTorch computes it, except in half precision on a CPU that has no instructions for that dtype: there the product is taken
in fp32 (see fastft_kernels.reference.linear).
"""

import functools

import torch
import torch.nn.functional as F

from fastft.ops import checks
from fastft_kernels.reference.linear import linear as widened


def linear(x, weight, bias=None):
    """x: [..., in]; weight: [out, in]; bias: [out] or None. Returns [..., out] in x's dtype.

    Raises ValueError for shapes, dtypes or devices that do not fit (autocast makes dtypes fit).
    """
    _check(x, weight, bias)
    if x.device.type == "cpu" and x.dtype == weight.dtype and not native(x.dtype) and not checks.autocasts("cpu"):
        return widened(x, weight, bias)
    return F.linear(x, weight, bias)


def _check(x, weight, bias):
    checks.tensors("linear", x=x, weight=weight)
    checks.optional_tensors("linear", bias=bias)
    columns = x.shape[-1] if x.dim() else 0
    facts = [f"{t.dtype} on {t.device}" for t in (x, weight, bias) if t is not None]
    if checks.autocasts(x.device.type):
        facts = [fact.rpartition(" ")[2] for fact in facts]
    fits = (
        x.dim()
        and weight.dim() == 2
        and weight.shape[1] == columns
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if not fits or len(set(facts)) > 1 or not x.is_floating_point():
        shapes = ", ".join(
            f"{n} {list(t.shape)}" for n, t in (("x", x), ("weight", weight), ("bias", bias)) if t is not None
        )
        raise ValueError(
            f"linear: {shapes} of {', '.join(facts)}; they must be [..., in], [out, in] and [out] of one floating dtype "
            "and device"
        )


@functools.cache
def native(dtype):
    """Whether this CPU has instructions for products in `dtype`."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True
