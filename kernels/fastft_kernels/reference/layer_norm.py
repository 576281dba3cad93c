"""LayerNorm in plain PyTorch, with dropout and a residual in front: what the kernels must compute.

    h = residual + dropout(x)                         (each where asked for; rounded once, to x's dtype)
    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

x, residual, h, y: [..., cols], float32, bfloat16, float16 or float64; weight, bias: [cols], both of one such dtype.
Everything is computed in float32 (float64 for float64) and y is rounded once, as torch.nn.LayerNorm does. The mask of
dropout is that of reference/dropout.py for the same seed; var divides by cols.
"""

import torch
import torch.nn.functional as F

from fastft_kernels.reference import _philox


def layer_norm(x, weight, bias, eps=1e-5, residual=None, dropout_p=0.0, seed=None):
    """y, or (y, h) with a residual. Differentiable, any number of times."""
    h = x
    if dropout_p:
        seed = seed.to(x.device) if isinstance(seed, torch.Tensor) else seed
        keep = _philox.keep_mask(x.shape, dropout_p, seed, x.device)
        h = (x.to(_wide(x)) * _philox.keep_scale(dropout_p)).masked_fill(~keep, 0)
    if residual is not None:
        h = h + residual
    h = h.to(x.dtype)
    if h.dtype == weight.dtype:
        y = F.layer_norm(h, weight.shape, weight, bias, eps)
    else:
        weight, bias = (None if t is None else t.to(_wide(h)) for t in (weight, bias))
        y = F.layer_norm(h.to(_wide(h)), weight.shape, weight, bias, eps).to(h.dtype)
    return y if residual is None else (y, h)


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)
