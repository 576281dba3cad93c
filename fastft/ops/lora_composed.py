"""A layer with a low-rank update in a compiled graph, where no custom op takes all of it: it is composed of smaller ones."""

import torch.nn.functional as F

from fastft.ops.lora_mask import mask_op
from fastft.ops.nf4 import NF4Weight, nf4_linear
from fastft_kernels.reference import lora as reference


def composed(x, weight, bias, lora_a, lora_b, scale, p, seed, backend):
    """One layer of a 4-bit weight: frozen product and mask are ops, the rest is compiled."""
    dropped = mask_op(x, p, seed, backend) if p else x
    scale = scale / reference.keep_probability(p)
    low_rank = F.linear(F.linear(dropped.to(lora_a.dtype), lora_a), lora_b) * scale
    frozen = nf4_linear(x, weight, bias) if isinstance(weight, NF4Weight) else F.linear(x, weight, bias)
    return (frozen + low_rank).to(x.dtype)
