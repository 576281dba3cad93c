"""Dropout in plain PyTorch, from few random draws and without a stored mask.

    y = x * keep / keep_probability,   keep ~ Bernoulli(1 - p)

`torch.bernoulli` takes one draw of a serial generator per element and costs more than a small matrix product. Here the
mask is a function of the seed and the element (_philox.py), 16 bits each: p is rounded to a multiple of 2^-16, and the
scale uses the rounded value, so the expectation is exact. The product is computed in float32 (float64 for float64); a
dropped element is 0, whatever it was.
"""

import torch

from fastft_kernels.reference import _philox


def dropout(x, p, seed):
    """x of any shape, 0 <= p < 1; seed: int, or an int64 tensor of one on the CPU. Differentiable any number of times.

    Saved for backward: the mask. It is the kernels that draw it again.
    """
    seed = seed.to(x.device) if isinstance(seed, torch.Tensor) else seed
    keep = _philox.keep_mask(x.shape, p, seed, x.device)
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) * _philox.keep_scale(p)
    return wide.masked_fill(~keep, 0).to(x.dtype)


def generator(device, seed=None):
    """A generator on `device`, seeded by `seed` (int or a tensor of one), by default with a draw from torch's own.

    The draw is from the CPU generator whatever the device: no synchronisation, and activation checkpointing, which
    restores that generator before it recomputes, sees the same masks again.
    """
    seed = torch.empty((), dtype=torch.int64).random_() if seed is None else seed
    return torch.Generator(device).manual_seed(int(seed))


def keep_mask(shape, p, generator, dtype):
    """(mask of 0 and 1 in `dtype`, the exact probability of 1)."""
    drop = min(round(p * 65536), 65535)
    elements = shape.numel()
    bits = torch.empty(-(-elements // 4), dtype=torch.int64, device=generator.device)
    bits.random_(-(2**63), None, generator=generator)
    keep = bits.view(torch.int16)[:elements].ge_(drop - 32768)  # in place it stays int16, which vectorises
    return keep.view(shape).to(dtype), 1 - drop / 65536
