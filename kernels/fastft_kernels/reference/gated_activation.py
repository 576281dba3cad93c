"""SwiGLU and GEGLU in plain PyTorch: what the kernels must compute.

    y = act(gate) * up

    silu        act(g) = g / (1 + exp(-g))                                             SwiGLU
    gelu        act(g) = g / 2 * (1 + erf(g / sqrt(2)))                                GEGLU
    gelu_tanh   act(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g ** 3)))      GEGLU, approximate="tanh"

gate, up, y: [..., cols], one of float32, bfloat16, float16 or float64. Here act(gate) is rounded before up multiplies, as
in transformers; the kernels compute in float32 and round once, at the end.
"""

import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated_activation(gate, up, activation):
    """y. Differentiable, any number of times."""
    return activate(gate, activation) * up


def activate(gate, activation):
    """act(gate)."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
