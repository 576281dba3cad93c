"""Rotary position embedding of queries and keys in plain PyTorch: what the kernels must compute.

    y1 = x1 * cos1 - x2 * sin1        x1, x2: elements j and j + R / 2 of a head, 0 <= j < R / 2
    y2 = x2 * cos2 + x1 * sin2        cos1, cos2, sin1, sin2: elements j and j + R / 2 of the token's cos and sin
    y  = x                            of the elements from R on

q [..., D] and k [..., D], 3 or 4 dimensions, one of float32, bfloat16, float16 or float64; cos, sin: their shape without
the dimension of heads, `unsqueeze_dim`, and with R <= D at the end, any of these dtypes. So q [B, H, S, D] with
unsqueeze_dim 1, [B, S, H, D] with 2, [T, H, D] with 1; the heads of k may be fewer. The first dimension of cos and sin may
be 1 where they have three. It is transformers' apply_rotary_pos_emb, whose scaled variants (Llama 3, YaRN, linear, dynamic)
all come in as other cos and sin. Here every product is rounded, as there; the kernels compute in float32 and round once.

Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
"""

import torch


def rope(q, k, cos, sin, unsqueeze_dim=1):
    """(q, k) rotated, in their dtypes. Differentiable in all four, any number of times."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x, cos, sin):
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    turned = (turned * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
