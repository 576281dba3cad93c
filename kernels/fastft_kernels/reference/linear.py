"""A linear layer for CPUs without half-precision arithmetic: half-precision tensors, fp32 products.

    y = x Wᵀ + b

x: [..., in], weight: [out, in], bias: [out] or None, y: [..., out]; bfloat16 or float16. Products and sums are fp32 and
rounded once, which is what the tensor cores and AMX tiles of other hardware compute. Where PyTorch has no such
instructions its own bf16 product takes about 14 times as long as an fp32 one; this takes little longer than that.
Saved for backward: x and weight, as they are.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def linear(x, weight, bias=None):
    """y, differentiable once in x, weight and bias."""
    return _Widened.apply(x, weight, bias)


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.float().reshape(-1, dy.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight.float()).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dy.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0).to(ctx.bias_dtype)
        return dx, dweight, dbias
