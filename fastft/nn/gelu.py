"""GELU as a layer: drop-in for torch.nn.GELU, and for a bias and GELU behind a product."""

import torch
from torch import nn

from fastft import ops
from fastft.ops import checks


class GELU(nn.Module):
    """y = gelu(x + bias), approximate as in torch.nn.GELU.

    Without `bias_size` there is no state, as in torch. With it the layer has a `bias` [bias_size], zero at first, which
    stands for that of the linear layer in front: nn.Sequential(nn.Linear(n, m, bias=False), GELU(bias_size=m)).
    """

    def __init__(self, approximate="none", *, bias_size=None, device=None, dtype=None):
        super().__init__()
        checks.choice("GELU", ("none", "tanh"), approximate=approximate)
        if bias_size is not None:
            checks.whole_numbers("GELU", 1, bias_size=bias_size)
        checks.factory("GELU", device, dtype)
        self.approximate = approximate
        bias = None if bias_size is None else nn.Parameter(torch.zeros(bias_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)

    def forward(self, x):
        return ops.gelu(x, self.bias, approximate=self.approximate)

    def extra_repr(self):
        size = "" if self.bias is None else f", bias_size={self.bias.numel()}"
        return f"approximate={self.approximate!r}{size}"
