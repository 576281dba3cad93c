"""Dropout as a layer: drop-in for torch.nn.Dropout."""

from torch import nn

from fastft import ops
from fastft.ops import checks


class Dropout(nn.Module):
    """In training elements become 0 with probability `p`, 0 <= p < 1, and the others are scaled by 1 / (1 - p)."""

    def __init__(self, p=0.5):
        super().__init__()
        checks.numbers("Dropout", p=p)
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p is {p}; it must be at least 0 and below 1")
        self.p = p

    def forward(self, x):
        checks.tensors("Dropout", x=x)
        return ops.dropout(x, self.p) if self.training else x

    def extra_repr(self):
        return f"p={self.p}"
