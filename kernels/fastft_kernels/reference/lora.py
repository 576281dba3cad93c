"""A linear layer with a low-rank update, LoRA (Hu et al., 2021, arXiv:2106.09685).

    y = x Wᵀ + b + scale * drop(x) Aᵀ Bᵀ

x: [..., in], W: [out, in], b: [out] or None, A: [r, in], B: [out, r], y: [..., out] in x's dtype. drop keeps the elements
that _philox.py says for the seed and divides by the exact probability of that; only the low-rank branch is dropped.
Rounding follows PEFT's lora.Linear: the branch is computed in A's dtype, added to x Wᵀ + b, and the sum is rounded to x's.
"""

import torch.nn.functional as F

from fastft_kernels.reference._philox import drop_threshold, keep_mask
from fastft_kernels.reference.gated_activation import gated_activation


def lora_linear(x, weight, bias, lora_a, lora_b, scale, dropout_p=0.0, seed=None):
    """y, differentiable any number of times in all tensors. seed: int or int64 scalar, needed where dropout_p > 0."""
    dropped = apply_mask(x, dropout_p, seed) / keep_probability(dropout_p) if dropout_p else x
    low_rank = F.linear(F.linear(dropped.to(lora_a.dtype), lora_a), lora_b) * scale
    return (F.linear(x, weight, bias) + low_rank).to(x.dtype)


def lora_mlp(x, gate, up, down, activation="silu", dropout_p=0.0, seeds=(None, None, None)):
    """down(act(gate(x)) * up(x)); gate, up, down: (weight, bias, lora_a, lora_b, scale)."""
    gate, up = (lora_linear(x, *layer, dropout_p, seed) for layer, seed in zip((gate, up), seeds, strict=False))
    return lora_linear(gated_activation(gate, up, activation), *down, dropout_p, seeds[2])


def apply_mask(x, p, seed):
    """x where it is kept, else 0."""
    return x.where(keep_mask(x.shape, p, seed, x.device), 0)


def keep_probability(p):
    return 1 - drop_threshold(p) / 65536
