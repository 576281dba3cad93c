"""A linear layer with a low-rank update, LoRA (Hu et al., 2021, arXiv:2106.09685), or DoRA (Liu et al., 2024,
arXiv:2402.09353) where there is a magnitude.

    y = x Wᵀ + b + scale * drop(x) Aᵀ Bᵀ
    y = x Wᵀ + b + (g - 1) drop(x) Wᵀ + g scale * drop(x) Aᵀ Bᵀ,   g = m / ||W + scale B A|| of each row

x: [..., in], W: [out, in], b: [out] or None, A: [r, in], B: [out, r], m: [out], y: [..., out] in x's dtype. drop keeps the
elements that _philox.py says for the seed and divides by the exact probability of that; only the update is dropped. The
norm is a constant for the gradient (section 4.3 of DoRA), which without dropout scales all of x (W + scale B A)ᵀ.
Rounding follows PEFT's lora.Linear: the update is computed in A's dtype, added to x Wᵀ + b, and the sum is rounded to x's.
"""

import torch.nn.functional as F

from fastft_kernels.reference._philox import drop_threshold, keep_mask
from fastft_kernels.reference.dora import row_norms
from fastft_kernels.reference.gated_activation import gated_activation


def lora_linear(x, weight, bias, lora_a, lora_b, scale, magnitude=None, dropout_p=0.0, seed=None):
    """y, differentiable any number of times in all tensors. seed: int or int64 scalar, needed where dropout_p > 0."""
    dropped = apply_mask(x, dropout_p, seed) / keep_probability(dropout_p) if dropout_p else x
    dropped = dropped.to(lora_a.dtype)
    update = F.linear(F.linear(dropped, lora_a), lora_b) * scale
    y = F.linear(x, weight, bias)
    if magnitude is not None:
        gain = magnitude / row_norms(weight, lora_a, lora_b, scale).to(magnitude.dtype)
        frozen = F.linear(dropped, weight.to(dropped.dtype)) if dropout_p else y if bias is None else y - bias
        update = (gain - 1) * frozen + gain * update
    return (y + update).to(x.dtype)


def lora_mlp(x, gate, up, down, activation="silu", dropout_p=0.0, seeds=(None, None, None)):
    """down(act(gate(x)) * up(x)); gate, up, down: (weight, bias, lora_a, lora_b, scale[, magnitude])."""
    run = lambda x, layer, seed: lora_linear(x, *layer, dropout_p=dropout_p, seed=seed)
    gate, up = run(x, gate, seeds[0]), run(x, up, seeds[1])
    return run(gated_activation(gate, up, activation), down, seeds[2])


def apply_mask(x, p, seed):
    """x where it is kept, else 0."""
    return x.where(keep_mask(x.shape, p, seed, x.device), 0)


def keep_probability(p):
    return 1 - drop_threshold(p) / 65536
