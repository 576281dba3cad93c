"""What DoRA (Liu et al., 2024, arXiv:2402.09353) adds to a low-rank update: each row of the updated weight has a magnitude.

    n = ||W + scale B A||                        of each row
    y = gain z + b [+ gain_u u]                  for each row of the weight, which is a column of y, z and u

W: [out, in], A: [r, in], B: [out, r], n and gains: [out], float32 or wider, b: [out] or None; z, u, y: [..., out] of
one dtype.
"""

import torch

_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
"""how many of the updated weight, which is never there at once, are computed together: by measurement on a CPU, and enough
to keep a GPU busy"""


@torch.no_grad()
def row_norms(weight, lora_a, lora_b, scale):
    """n, in float32 or wider. Sums of squares of the updated rows themselves: nothing cancels and none is negative."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, lora_a.dtype), torch.float32)
    lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    count = max(1, _ELEMENTS.get(weight.device.type, 2**20) // max(1, weight.shape[1]))
    pieces = zip(weight.split(count), lora_b.split(count), strict=True)
    return torch.cat([W.to(dtype, copy=True).addmm_(B, lora_a, alpha=scale).norm(dim=1) for W, B in pieces])


def forward(z, gain, bias, u=None, gain_u=None):
    """y, rounded once."""
    y = z * gain
    if u is not None:
        y = y.addcmul_(u, gain_u)
    return (y if bias is None else y.add_(bias)).to(z.dtype)


def backward(dy, z, gain, needs_dbias):
    """(gain dy, the sums of dy z over the rows, or None where z is, the sums of dy, or None); sums are of gain's dtype."""
    dy = dy.reshape(-1, dy.shape[-1])
    dgain = None if z is None else (dy * z.view_as(dy)).sum(0, dtype=gain.dtype)
    return (dy * gain).to(dy.dtype), dgain, dy.sum(0, dtype=gain.dtype) if needs_dbias else None
