"""Drop-in layers over fastft.ops. One file per layer."""

from fastft.nn.lora import LoRALinear
from fastft.nn.rms_norm import RMSNorm

__all__ = ["LoRALinear", "RMSNorm"]
