"""RMSNorm as a layer: drop-in for transformers' LlamaRMSNorm (offset 0) and GemmaRMSNorm (offset 1)."""

import torch
from torch import nn

from fastft import ops
from fastft.ops import checks


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x ** 2) + eps) * (offset + weight) over the last dimension, of size `hidden_size`.

    The only state is `weight` [hidden_size], as in transformers; a new layer scales by 1. forward(x) returns y;
    forward(x, residual) adds first and returns (y, x + residual).
    """

    def __init__(self, hidden_size, eps=1e-6, *, offset=0.0, device=None, dtype=None):
        super().__init__()
        checks.whole_numbers("RMSNorm", 1, hidden_size=hidden_size)
        checks.numbers("RMSNorm", eps=eps, offset=offset)
        checks.factory("RMSNorm", device, dtype)
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - offset, device=device, dtype=dtype))
        self.eps = eps
        self.offset = offset

    def forward(self, x, residual=None):
        return ops.rms_norm(x, self.weight, self.eps, offset=self.offset, residual=residual)

    def extra_repr(self):
        return f"{self.weight.numel()}, eps={self.eps}, offset={self.offset}"
