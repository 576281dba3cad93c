"""DoRA: LoRA layers whose updated weight has rows of a magnitude of their own, as PEFT computes them (reference/lora.py).

    y = g (x Wᵀ + scale x Aᵀ Bᵀ) + b,   g = m / n,   n = ||W + scale B A|| of each row, a constant for the gradient
    y = x Wᵀ + b + (g - 1) drop(x) Wᵀ + g scale drop(x) Aᵀ Bᵀ   with dropout, which takes two frozen products

Without dropout LoRA's op computes z, the result without g and b, for all layers of a group, and `scaled` each y behind it.
With dropout `dropped` computes a layer alone. Both save z besides what LoRA saves, for dm = sum of dy z / n: y is no
substitute, since g may be zero, and to compute z again would make three frozen products of two (with dropout, five of four).
The mask is drawn again in backward. n is read off the rows of W + scale B A themselves, some at a time, in float32: the
three sums of its square, which need no B A, cancel where an update undoes a row, and are no faster.
"""

import torch
from torch.autograd.function import once_differentiable

from fastft.ops import dispatch
from fastft.ops.lora_arguments import as_they_are
from fastft.ops.lora_mask import apply_mask
from fastft.ops.nf4 import NF4Weight, dense, product_dtype
from fastft_kernels.reference import dora as reference
from fastft_kernels.reference.lora import keep_probability

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not_dtype(x, *_):
    return None if x.dtype in _DTYPES else f"it computes float32, bfloat16 and float16, and x is {x.dtype}"


_KERNELS = dispatch.register("dora", cpp=_why_not_dtype)


def _kernels(backend):
    """Those of the backend that serves LoRA; PyTorch's formula where it has none, as Triton."""
    return _KERNELS.get(backend, reference)


@torch.no_grad()
def row_norms(x, weight, lora_a, lora_b, scale, magnitude):
    """n [out], float32 (float64 where x is), rounded to the magnitude's dtype as PEFT does: a new adapter changes nothing."""
    if isinstance(weight, NF4Weight):
        weight = dense(weight, product_dtype(x))  # as the products read it
    with as_they_are(x):
        norms = reference.row_norms(weight, lora_a, lora_b, scale)
    return norms.to(magnitude.dtype).to(torch.promote_types(x.dtype, torch.float32))


def scaled(z, magnitude, norms, bias, backend):
    """y = magnitude / norms * z + bias; z: [..., out]."""
    if torch.compiler.is_compiling():
        return reference.forward(z, magnitude.to(norms.dtype) / norms, bias)
    return _Scaled.apply(z, magnitude, norms, bias, backend)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, magnitude, norms, bias, backend):
        gain = magnitude.to(norms.dtype) / norms
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, gain, norms)
        ctx.dtypes, ctx.backend = (magnitude.dtype, None if bias is None else bias.dtype), backend
        return _kernels(backend).forward(z, gain, _like(bias, gain.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        z, gain, norms = ctx.saved_tensors
        dz, dgain, dbias = _kernels(ctx.backend).backward(dy, z, gain, ctx.needs_input_grad[3])
        dm = None if dgain is None else dgain / norms
        return dz.view(dy.shape), _like(dm, ctx.dtypes[0]), None, _like(dbias, ctx.dtypes[1]), None


def _like(t, dtype):
    return None if t is None else t.to(dtype)


def dropped(x, weight, bias, lora_a, lora_b, scale, magnitude, norms, p, seed, backend):
    """y of one layer with dropout_p = p > 0."""
    return _Dropped.apply(x, scale, p, seed, backend, weight, bias, lora_a, lora_b, magnitude, norms)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, p, seed, backend, weight, bias, lora_a, lora_b, magnitude, norms):
        dtype, keep = product_dtype(x), keep_probability(p)
        rows, W = x.reshape(-1, x.shape[-1]).to(dtype), dense(weight, dtype).t()
        kept, gain = apply_mask(rows, p, seed, backend), magnitude.to(norms.dtype) / norms
        S, u = kept @ lora_a.to(dtype).t(), kept @ W
        low = S @ (lora_b * (scale / keep)).to(dtype).t()
        y = _kernels(backend).forward(low, gain, _like(bias, gain.dtype), u, (gain - 1) / keep).addmm_(rows, W)
        z = low.add_(u, alpha=1 / keep) if ctx.needs_input_grad[9] else None
        is_nf4 = isinstance(weight, NF4Weight)
        ctx.save_for_backward(x, S, z, gain, norms, None if is_nf4 else weight, lora_a, lora_b, seed)
        ctx.quantized = weight if is_nf4 else None
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias, lora_a, lora_b, magnitude)]
        ctx.scale, ctx.p, ctx.backend = scale, p, backend
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, S, z, gain, norms, weight, lora_a, lora_b, seed = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias, needs_da, needs_db = (ctx.needs_input_grad[i] for i in (0, 5, 6, 7, 8))
        dtype, keep = S.dtype, keep_probability(ctx.p)
        rows, dy = x.reshape(-1, x.shape[-1]).to(dtype), dy.reshape(-1, dy.shape[-1]).to(dtype)
        du, dgain, dbias = _kernels(ctx.backend).backward(dy, z, (gain - 1) / keep, needs_dbias)
        scales = gain * (ctx.scale / keep)
        dx = dweight = da = db = None
        if needs_da or needs_dweight:
            kept = apply_mask(rows, ctx.p, seed, ctx.backend)
        if needs_dx or needs_da:
            dlow = dy @ (lora_b * scales[:, None]).to(dtype)
        if needs_da:
            da = dlow.t() @ kept
        if needs_db:
            db = ((S.t() @ dy) * scales).t().contiguous()
        if needs_dweight:
            dweight = (dy.t() @ rows).addmm_(du.t(), kept)
        if needs_dx:
            W = dense(ctx.quantized if weight is None else weight, dtype)
            dx = apply_mask((dlow @ lora_a.to(dtype)).addmm_(du, W), ctx.p, seed, ctx.backend).addmm_(dy, W)
            dx = dx.to(x.dtype).view(x.shape)
        gradients = dweight, dbias, da, db, None if dgain is None else dgain / norms
        gradients = (_like(gradient, to) for gradient, to in zip(gradients, ctx.dtypes, strict=True))
        return dx, None, None, None, None, *gradients, None
