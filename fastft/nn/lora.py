"""A linear layer with a low-rank update as a layer, for models that PEFT does not build."""

import math

import torch
from torch import nn

from fastft import ops
from fastft.ops import checks, dora


class LoRALinear(nn.Module):
    """y = x Wᵀ + b + alpha / r * drop(x) Aᵀ Bᵀ with W and b frozen; with use_dora rows of a magnitude, as ops.lora_linear says.

    State: `weight` [out_features, in_features], `bias` [out_features] or None, `lora_A` [r, in_features],
    `lora_B` [out_features, r], and with use_dora `lora_magnitude` [out_features], else None. A starts as PEFT starts it, B at
    zero and the magnitudes at the norms of the rows of the weight, so that a new layer adds nothing. use_rslora:
    scale by alpha / sqrt(r) instead. lora_dropout: on the update, in training. `from_linear` wraps a layer,
    sharing its parameters; `merge` gives back a plain nn.Linear with the update in its weight.
    Raises ValueError for r below 1 or a dropout that is not in [0, 1).
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        r=16,
        lora_alpha=32.0,
        lora_dropout=0.0,
        use_rslora=False,
        use_dora=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        checks.whole_numbers("LoRALinear", 1, in_features=in_features, out_features=out_features, r=r)
        checks.numbers("LoRALinear", lora_alpha=lora_alpha, lora_dropout=lora_dropout)
        checks.flags("LoRALinear", bias=bias, use_rslora=use_rslora, use_dora=use_dora)
        checks.factory("LoRALinear", device, dtype)
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"LoRALinear: lora_dropout is {lora_dropout}; it must be at least 0 and below 1")
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype).requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = lora_dropout
        self.lora_magnitude = None
        if use_dora:
            self._start_magnitude()

    @classmethod
    def from_linear(cls, linear, **settings):
        """A layer around `linear`, an nn.Linear, whose parameters it shares and freezes."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"LoRALinear.from_linear: linear is {checks.shown(linear)}; it must be a torch.nn.Linear")
        weight = linear.weight
        layer = cls(linear.in_features, linear.out_features, False, device="meta", dtype=weight.dtype, **settings)
        layer.weight, layer.bias = weight.requires_grad_(False), linear.bias
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        layer.lora_A = nn.Parameter(torch.empty_like(layer.lora_A, device=weight.device))
        layer.lora_B = nn.Parameter(torch.zeros_like(layer.lora_B, device=weight.device))
        nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
        if layer.lora_magnitude is not None:
            layer._start_magnitude()
        return layer

    def forward(self, x):
        parameters = self.weight, self.bias, self.lora_A, self.lora_B, self.scale, self.lora_magnitude
        return ops.lora_linear(x, *parameters, dropout_p=self.lora_dropout if self.training else 0.0)

    @torch.no_grad()
    def merge(self):
        """An nn.Linear with weight W + scale * B A, its rows scaled to their magnitudes, rounded once, and the same bias."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, False, device="meta")
        weight = self.weight.float() + self.lora_B.float() @ self.lora_A.float() * self.scale
        if self.lora_magnitude is not None:
            weight *= (self.lora_magnitude / self._row_norms(self.lora_magnitude))[:, None]
        linear.weight = nn.Parameter(weight.to(self.weight.dtype))
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        return linear

    def extra_repr(self):
        out_features, in_features = self.weight.shape
        text = f"{in_features}, {out_features}, r={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.lora_dropout}"
        return text if self.lora_magnitude is None else f"{text}, dora"

    def _start_magnitude(self):
        self.lora_magnitude = nn.Parameter(self._row_norms(self.weight).to(self.weight.dtype))

    def _row_norms(self, like):
        """Norms of the rows of the updated weight, rounded to the dtype of `like`."""
        return dora.row_norms(self.weight, self.weight, self.lora_A, self.lora_B, self.scale, like)
