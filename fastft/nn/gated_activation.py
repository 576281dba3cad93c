"""SwiGLU and GEGLU as a layer: what stands between the two products and the third of a gated MLP."""

from torch import nn

from fastft import ops
from fastft.ops import checks
from fastft.ops.gated_activation import ACTIVATIONS


class GatedActivation(nn.Module):
    """y = activation(gate) * up; activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU). It has no state.

    forward(gate, up): [..., cols] of one shape and dtype, as `fastft.ops.swiglu` takes them.
    """

    def __init__(self, activation="silu"):
        super().__init__()
        checks.choice("GatedActivation", ACTIVATIONS, activation=activation)
        self.activation = activation

    def forward(self, gate, up):
        if self.activation == "silu":
            return ops.swiglu(gate, up)
        return ops.geglu(gate, up, approximate="tanh" if self.activation == "gelu_tanh" else "none")

    def extra_repr(self):
        return f"{self.activation!r}"
