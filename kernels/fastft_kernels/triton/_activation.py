"""SiLU and GELU with their derivatives, for the kernels that apply them. Equations: reference/gated_activation.py."""

import triton
import triton.language as tl


@triton.jit
def act(g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)) of float32 values."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        slope = s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == "gelu":
        s = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        slope = s + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))
    else:  # (1 + tanh(u)) / 2 is the logistic function s of 2 u; s and 1 - s without a difference, which g ** 3 would enlarge
        twice_u = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        e = tl.exp(-tl.abs(twice_u))
        large = 1.0 / (1.0 + e)
        small = e * large
        s = tl.where(twice_u < 0.0, small, large)
        slope = s + g * (large * small) * (1.5957691216057308 * (1.0 + 0.134145 * g * g))
    return g * s, slope
