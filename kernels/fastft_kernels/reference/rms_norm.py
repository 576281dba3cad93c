"""RMSNorm in plain PyTorch: what the kernels must compute.

    h = x + residual                                  (only with a residual; rounded to x's dtype)
    y = h / sqrt(mean(h ** 2) + eps) * (offset + weight)

x, residual, h, y: [..., cols], float32, bfloat16, float16 or float64; weight: [cols], any of these. The norm is
computed in float32 (float64 for float64). Where it is rounded follows transformers, so that models reproduce their
logits: with offset 0 as LlamaRMSNorm, which rounds to x's dtype before the weight multiplies; otherwise as
GemmaRMSNorm, which rounds once, at the end.
"""

import torch


def rms_norm(x, weight, eps=1e-6, offset=0.0, residual=None):
    """y, or (y, h) with a residual. Differentiable, any number of times."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset == 0:
        y = weight * normalised.to(h.dtype)
    else:
        y = normalised * (offset + weight.to(wide.dtype))
    y = y.to(h.dtype)
    return y if residual is None else (y, h)
