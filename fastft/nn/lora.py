"""A linear layer with a low-rank update as a layer, for models that PEFT does not build."""

import math

import torch
from torch import nn

from fastft import ops
from fastft.ops import checks


class LoRALinear(nn.Module):
    """y = x Wᵀ + b + alpha / r * drop(x) Aᵀ Bᵀ with W and b frozen.

    State: `weight` [out_features, in_features], `bias` [out_features] or None, `lora_A` [r, in_features],
    `lora_B` [out_features, r]. A starts as PEFT starts it and B at zero, so that a new layer adds nothing. use_rslora:
    scale by alpha / sqrt(r) instead. lora_dropout: on the low-rank branch, in training. `from_linear` wraps a layer,
    sharing its parameters; `merge` gives back a plain nn.Linear with the update added to its weight.
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
        device=None,
        dtype=None,
    ):
        super().__init__()
        checks.whole_numbers("LoRALinear", 1, in_features=in_features, out_features=out_features, r=r)
        checks.numbers("LoRALinear", lora_alpha=lora_alpha, lora_dropout=lora_dropout)
        checks.flags("LoRALinear", bias=bias, use_rslora=use_rslora)
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
        return layer

    def forward(self, x):
        p = self.lora_dropout if self.training else 0.0
        return ops.lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, dropout_p=p)

    @torch.no_grad()
    def merge(self):
        """An nn.Linear with weight W + scale * B A, rounded once, and the same bias."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, False, device="meta")
        update = self.lora_B.float() @ self.lora_A.float() * self.scale
        linear.weight = nn.Parameter((self.weight.float() + update).to(self.weight.dtype))
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        return linear

    def extra_repr(self):
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, r={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.lora_dropout}"
