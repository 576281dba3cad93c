"""GELU in plain PyTorch, with a bias that is added first: what the kernels must compute.

    h = x + bias                                                                    (only with a bias)

    none   y = h / 2 * (1 + erf(h / sqrt(2)))
    tanh   y = h / 2 * (1 + tanh(sqrt(2 / pi) * (h + 0.044715 h ** 3)))

x, y: [..., cols], float32, bfloat16, float16 or float64; bias: [cols], any of these. Here h is rounded to x's dtype, as
behind a linear layer; the kernels compute in float32 and round once, at the end.
"""

import torch.nn.functional as F

ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}
"""What torch calls the two -> their names among the activations of gated_activation.py"""


def gelu(x, bias=None, approximate="none"):
    """y. Differentiable, any number of times."""
    h = x if bias is None else (x + bias).to(x.dtype)
    return F.gelu(h, approximate=approximate)
