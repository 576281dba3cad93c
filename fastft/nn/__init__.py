"""Drop-in layers over fastft.ops. One file per layer."""

from fastft.nn.attention import FusedAttention
from fastft.nn.cross_entropy import CrossEntropyLoss
from fastft.nn.dropout import Dropout
from fastft.nn.gated_activation import GatedActivation
from fastft.nn.gelu import GELU
from fastft.nn.layer_norm import LayerNorm
from fastft.nn.linear4bit import Linear4bit
from fastft.nn.linear_cross_entropy import LinearCrossEntropyLoss
from fastft.nn.lora import LoRALinear
from fastft.nn.rms_norm import RMSNorm
from fastft.nn.rope import RotaryEmbedding

__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "Dropout",
    "FusedAttention",
    "GatedActivation",
    "LayerNorm",
    "Linear4bit",
    "LinearCrossEntropyLoss",
    "LoRALinear",
    "RMSNorm",
    "RotaryEmbedding",
]
