"""LayerNorm as a layer: drop-in for torch.nn.LayerNorm over the last dimension."""

import torch
from torch import nn

from fastft import ops
from fastft.ops import checks


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension, of size `hidden_size`.

    The state is `weight` and, unless bias=False, `bias`, both [hidden_size], as in torch. forward(x) returns y;
    forward(x, residual) adds first, dropping elements of x with probability `dropout_p` in training, and returns
    (y, residual + dropout(x)).
    """

    def __init__(self, hidden_size, eps=1e-5, *, bias=True, dropout_p=0.0, device=None, dtype=None):
        super().__init__()
        checks.whole_numbers("LayerNorm", 1, hidden_size=hidden_size)
        checks.numbers("LayerNorm", eps=eps, dropout_p=dropout_p)
        checks.flags("LayerNorm", bias=bias)
        checks.factory("LayerNorm", device, dtype)
        if not 0 <= dropout_p < 1:
            raise ValueError(f"LayerNorm: dropout_p is {dropout_p}; it must be at least 0 and below 1")
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype)) if bias else None
        )
        self.eps = eps
        self.dropout_p = dropout_p

    def forward(self, x, residual=None):
        dropout_p = self.dropout_p if self.training else 0.0
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual, dropout_p=dropout_p)

    def extra_repr(self):
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}, dropout_p={self.dropout_p}"
