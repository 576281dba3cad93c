"""Rotary position embedding as a layer, for models with projections and attention of their own."""

import math

import torch
from torch import nn

from fastft import ops
from fastft.ops import checks


class RotaryEmbedding(nn.Module):
    """Turns the pairs (j, j + dim / 2) of each head of q and k by the angle p * theta ** (-2 j / dim), p being the position.

    It has no parameters. The first `dim` elements of a head are turned, an even number; the others stay as they are.

    forward(q, k, position_ids=None) returns both, turned: q [B, S, H, D], k [B, S, H', D] and position_ids [B, S] or
    [1, S]; packed, [T, H, D], [T, H', D] and [T]. None: positions count from 0, which is not for packed rows.
    Errors as in `fastft.ops.rope`.
    """

    def __init__(self, dim, *, theta=10000.0):
        super().__init__()
        checks.whole_numbers("RotaryEmbedding", dim=dim)
        checks.numbers("RotaryEmbedding", theta=theta)
        if not 0 < theta < math.inf:
            raise ValueError(f"RotaryEmbedding: theta is {theta}; it must be positive and finite")
        if dim < 2 or dim % 2:
            raise ValueError(f"RotaryEmbedding: dim is {dim}; it must be a positive even number")
        self.dim = dim
        self.theta = theta

    def forward(self, q, k, position_ids=None):
        checks.tensors("RotaryEmbedding", q=q, k=k)
        checks.optional_tensors("RotaryEmbedding", position_ids=position_ids)
        if q.dim() not in (3, 4):
            raise ValueError(f"RotaryEmbedding: q is {list(q.shape)}; it must be [B, S, H, D] or [T, H, D]")
        tokens = list(q.shape[:-2])
        shapes = [tokens, [1, *tokens[1:]]] if q.dim() == 4 else [tokens]
        p = position_ids
        if p is not None and (list(p.shape) not in shapes or p.device != q.device or p.is_complex()):
            raise ValueError(
                f"RotaryEmbedding: position_ids are {list(p.shape)} of {p.dtype} on {p.device}; for q {list(q.shape)} they "
                f"must be real numbers, {tokens} on {q.device}"
            )
        if position_ids is None and q.dim() == 3:
            raise ValueError("RotaryEmbedding: packed q and k need position_ids that start anew with each sequence")
        if position_ids is None:
            position_ids = torch.arange(q.shape[1], device=q.device)[None]
        exponents = torch.arange(0, self.dim, 2, device=q.device, dtype=torch.float32) / self.dim
        angles = position_ids[..., None] * self.theta**-exponents
        angles = torch.cat((angles, angles), -1)
        return ops.rope(q, k, angles.cos(), angles.sin(), unsqueeze_dim=q.dim() - 2)

    def extra_repr(self):
        return f"{self.dim}, theta={self.theta}"
