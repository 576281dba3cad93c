"""A frozen linear layer in 4 bits, for QLoRA: bitsandbytes' format, without bitsandbytes."""

import contextlib
from dataclasses import replace

import torch
from torch import nn

from fastft import ops
from fastft.ops import checks
from fastft.ops.nf4 import BLOCK, STATE

_OMITTED = {"state": False}
NAMES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)


class Linear4bit(nn.Linear):
    """y = x Wᵀ + b with W in 4 bits, NF4, and frozen; x of any floating dtype, which is y's.

    State: `weight` [(in_features * out_features + 1) // 2, 1] uint8, `bias` [out_features] or None, and beside the weight
    what says how to read it, under bitsandbytes' names: `weight.absmax`, `weight.quant_map`, `weight.nested_absmax`,
    `weight.nested_quant_map`, `weight.quant_state.bitsandbytes__nf4`. `load_state_dict` takes these, or the weight of an
    nn.Linear, which it quantises. PEFT puts LoRA on it as on an nn.Linear; to merge, `dequantize` first.
    `from_linear` quantises a layer; `dequantize` gives back an nn.Linear; `quantized` is the weight as an ops.NF4Weight.
    """

    def __init__(self, in_features, out_features, bias=True, *, device=None, dtype=None):
        checks.whole_numbers("Linear4bit", 1, in_features=in_features, out_features=out_features)
        checks.flags("Linear4bit", bias=bias)
        checks.factory("Linear4bit", device, dtype)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        weight = self.weight.detach()
        self._set(None)
        if weight.device.type != "meta":
            self.quantize(weight)

    @classmethod
    def from_linear(cls, linear, *, block=BLOCK, double_quant=True):
        """The layer in 4 bits; it keeps the bias that `linear` has. ValueError where the weight holds NaN or infinity."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"Linear4bit.from_linear: linear is {checks.shown(linear)}; it must be a torch.nn.Linear")
        weight = linear.weight
        layer = cls(linear.in_features, linear.out_features, False, device="meta", dtype=weight.dtype)
        layer.quantize(weight.detach(), block=block, double_quant=double_quant)
        layer.bias = linear.bias
        return layer

    def quantize(self, weight, **options):
        """Takes `weight` [out_features, in_features]; options: those of ops.quantize_nf4."""
        checks.tensors("Linear4bit.quantize", weight=weight)
        self._check_shape(weight.shape)
        self._set(ops.quantize_nf4(weight, **options))

    def dequantize(self, dtype=None):
        """An nn.Linear with the weight in `dtype`, by default that which was quantised, and this layer's bias."""
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta")
        linear.weight = nn.Parameter(ops.dequantize_nf4(self.quantized, dtype), requires_grad=False)
        linear.bias = self.bias
        return linear

    @property
    def quantized(self):
        if self._state is None:
            raise ValueError(f"Linear4bit {self.in_features} -> {self.out_features}: no weight has been loaded")
        return self._state

    def forward(self, x):
        return ops.nf4_linear(x, self.quantized, self.bias)

    def extra_repr(self):
        return f"{super().extra_repr()}, nf4"

    def _set(self, weight):
        """Takes an NF4Weight; its codes are `weight`. None: there is none yet."""
        size = (self.in_features * self.out_features + 1) // 2
        codes = torch.empty(size, 1, dtype=torch.uint8, device="meta") if weight is None else weight.codes.view(-1, 1)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self._state = weight and replace(weight, codes=self.weight.detach())

    def _check_shape(self, shape):
        if tuple(shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"Linear4bit: the weight is {list(shape)}; this layer needs [{self.out_features}, {self.in_features}]"
            )

    # The state moves with the layer, but its floats stay what they are when the layer is cast.
    def _apply(self, function, recurse=True):
        super()._apply(function, recurse)
        if self._state is not None:
            keep = lambda t: function(t.view(torch.uint8)).view(t.dtype)
            self._state = replace(self._state.map(keep), codes=self.weight.detach())
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._state is not None and not _OMITTED["state"]:
            for name, t in self._state.state().items():
                destination[f"{prefix}weight.{name}"] = t

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        found = {name: state_dict.pop(f"{prefix}weight.{name}", None) for name in NAMES}
        weight, device = state_dict.pop(f"{prefix}weight", None), self.weight.device
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if weight is None:
            return
        missing.remove(f"{prefix}weight")
        move = lambda t: t.to("cpu" if device.type == "meta" else device, copy=True)
        try:
            if weight.is_floating_point():
                self.quantize(move(weight))
            else:
                self.load(move(weight), {name: move(t) for name, t in found.items() if t is not None})
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}")

    def load(self, codes, state):
        """Takes the weight of a file: its codes, and {name: tensor} of what lies beside it (ops.NF4Weight.from_state)."""
        weight = ops.NF4Weight.from_state(codes, state)
        self._check_shape(weight.shape)
        self._set(weight)


@contextlib.contextmanager
def without_state():
    """Context: state dicts hold `weight` alone of these layers, which whoever leaves out frozen parameters leaves out too."""
    _OMITTED["state"] = True
    try:
        yield
    finally:
        _OMITTED["state"] = False
