"""A layer with a low-rank update in a compiled graph, where no custom op takes all of it: it is composed of smaller ones.

That is, with a 4-bit weight, and with a magnitude behind dropout. Frozen product and mask are ops, the rest is compiled.
"""

import torch.nn.functional as F

from fastft.ops.lora_mask import mask_op
from fastft.ops.nf4 import NF4Weight, nf4_linear
from fastft_kernels.reference import lora as reference


def composed(x, weight, bias, lora_a, lora_b, scale, magnitude, norms, p, seed, backend):
    """y of one layer. norms: those of the rows of the updated weight where there is a magnitude (ops/dora.py)."""
    dropped = mask_op(x, p, seed, backend) if p else x
    keep = reference.keep_probability(p)
    low_rank = F.linear(F.linear(dropped.to(lora_a.dtype), lora_a), lora_b) * (scale / keep)
    if magnitude is None:
        return (_frozen(x, weight, bias) + low_rank).to(x.dtype)
    gain = magnitude.to(norms.dtype) / norms
    if not p:
        y = gain * (_frozen(x, weight, None) + low_rank)
        return (y if bias is None else y + bias).to(x.dtype)
    update = (gain - 1) / keep * _frozen(dropped, weight, None) + gain * low_rank
    return (_frozen(x, weight, bias) + update).to(x.dtype)


def _frozen(x, weight, bias):
    return nf4_linear(x, weight, bias) if isinstance(weight, NF4Weight) else F.linear(x, weight, bias)
