"""The ops of fastft as functions: autograd, torch.compile, and the choice of a backend. One file per op.

The functions are bound here, eagerly, so that none turns into the submodule of its name when that is imported.
"""

from fastft.ops.attention import attention
from fastft.ops.cross_entropy import cross_entropy
from fastft.ops.dropout import dropout
from fastft.ops.gated_activation import geglu, swiglu
from fastft.ops.gelu import gelu
from fastft.ops.layer_norm import layer_norm
from fastft.ops.linear import linear
from fastft.ops.linear_cross_entropy import linear_cross_entropy
from fastft.ops.linear_distillation import linear_distillation
from fastft.ops.lora import lora_group, lora_linear
from fastft.ops.lora_mlp import lora_mlp
from fastft.ops.nf4 import NF4Weight, dequantize_nf4, nf4_linear, quantize_nf4
from fastft.ops.rms_norm import rms_norm
from fastft.ops.rope import rope

__all__ = [
    "NF4Weight",
    "attention",
    "cross_entropy",
    "dequantize_nf4",
    "dropout",
    "geglu",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_distillation",
    "lora_group",
    "lora_linear",
    "lora_mlp",
    "nf4_linear",
    "quantize_nf4",
    "rms_norm",
    "rope",
    "swiglu",
]
