"""Dropout that spends few random draws, which on a CPU cost more than the arithmetic.

    y = x * keep / keep_probability,   keep ~ Bernoulli(1 - p)

The mask differs from torch's for the same seed; its distribution does not (p is rounded to a multiple of 2^-16). Under
torch.compile it is torch's dropout, whose random numbers the compiler fuses into the neighbouring arithmetic.
"""

import torch
import torch.nn.functional as F

from fastft.ops import dispatch
from fastft_kernels.reference.dropout import dropout as reference

dispatch.register("dropout")


def dropout(x, p):
    """x with elements dropped, 0 <= p < 1, and the others scaled so that the expectation stays.

    x: any shape, floating. Random numbers come from torch's CPU generator, so a recomputation that restores it, as
    activation checkpointing does, drops the same elements. Saved for backward: the mask, in x's dtype.
    Raises ValueError for another dtype or p, BackendError where a backend that was asked for cannot serve.
    """
    if not x.is_floating_point() or not 0 <= p < 1:
        raise ValueError(f"dropout: x of {x.dtype}, p {p}: x must be floating, p at least 0 and below 1")
    dispatch.choose("dropout", x)
    if torch.compiler.is_compiling():
        return F.dropout(x, p)
    return reference(x, p) if p else x
