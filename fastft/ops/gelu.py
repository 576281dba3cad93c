"""GELU, with a bias that is added first: the end of a linear layer and its activation, in one pass.

    h = x + bias                                                                     (only with a bias)
    approximate="none"    y = h / 2 * (1 + erf(h / sqrt(2)))
    approximate="tanh"    y = h / 2 * (1 + tanh(sqrt(2 / pi) * (h + 0.044715 h ** 3)))

Kernels compute in float32 and round once, at the end. Backward keeps x and bias alone and computes the activation again.
y has the dtype of x under autocast too: no autocast rule is registered, there being nothing to cast.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.ops import checks, dispatch
from fastft_kernels.reference.gelu import gelu as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not_dtype(x, bias):
    if x.dtype not in _DTYPES or bias.dtype not in _DTYPES:
        return f"it computes float32, bfloat16 and float16, and x is {x.dtype} with a bias of {bias.dtype}"
    return None


_KERNELS = dispatch.register("gelu", triton=_why_not_dtype, cpp=_why_not_dtype)


# A custom op cannot return None: a gradient that is not there is an empty tensor.
def _forward(x, bias, approximate, backend):
    return _KERNELS[backend].forward(x, bias, approximate)


def _backward(dy, x, bias, approximate, needs_dbias, backend):
    dx, dbias = _KERNELS[backend].backward(dy, x, bias, approximate, needs_dbias)
    return dx, x.new_empty(0) if dbias is None else dbias


def _setup_context(ctx, inputs, output):
    x, bias, ctx.approximate, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx, backward, dy):
    """Gradients of the four inputs. `backward` is the function above or the custom op around it."""
    needs_dx, needs_dbias, _, _ = ctx.needs_input_grad
    dx, dbias = backward(dy, *ctx.saved_tensors, ctx.approximate, needs_dbias, ctx.backend)
    return dx if needs_dx else None, dbias if needs_dbias else None, None, None


class _GELU(torch.autograd.Function):
    """The eager path: less than half the dispatch cost of a custom op."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _gradients(ctx, _backward, dy)


@torch.library.custom_op("fastft::gelu", mutates_args=())
def _op(x: Tensor, bias: Tensor | None, approximate: str, backend: str) -> Tensor:
    return _forward(x, bias, approximate, backend)


@_op.register_fake
def _(x, bias, approximate, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastft::gelu_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needs_dbias: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return _backward(dy, x, bias, approximate, needs_dbias, backend)


@_backward_op.register_fake
def _(dy, x, bias, approximate, needs_dbias, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(bias, memory_format=torch.contiguous_format) if needs_dbias else x.new_empty(0)


_op.register_autograd(lambda ctx, dy: _gradients(ctx, _backward_op, dy), setup_context=_setup_context)


def gelu(x, bias=None, *, approximate="none"):
    """gelu(x + bias), approximate as in torch.nn.functional.gelu.

    x, y: [..., cols], floating point, any strides; bias: [cols], any floating dtype, or None.
    Differentiable once in x and bias (any number of times under fastft.backend("reference")).
    Raises ValueError for shapes, dtypes or an approximation that do not fit, BackendError where the backend asked for
    cannot serve.
    """
    _check(x, bias, approximate)
    backend = dispatch.choose("gelu", x, x if bias is None else bias)
    if backend == "reference":
        return reference(x, bias, approximate)
    run = _op if torch.compiler.is_compiling() else _GELU.apply
    return run(x, bias, approximate, backend)


def _check(x, bias, approximate):
    checks.tensors("gelu", x=x)
    checks.optional_tensors("gelu", bias=bias)
    checks.choice("gelu", ("none", "tanh"), approximate=approximate)
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"gelu: x is {list(x.shape)} of {x.dtype}; it must be [..., cols] of a floating dtype")
    if bias is not None and (bias.shape != x.shape[-1:] or not bias.is_floating_point() or bias.device != x.device):
        raise ValueError(
            f"gelu: bias is {list(bias.shape)} of {bias.dtype} on {bias.device}; for x {list(x.shape)} "
            f"it must be [{x.shape[-1]}] of a floating dtype on {x.device}, or None"
        )
