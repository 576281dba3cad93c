"""RMSNorm, with an optional residual that is added first.

    h = x + residual                                  (only with a residual)
    y = h / sqrt(mean(h ** 2) + eps) * (offset + weight)

Rounding follows transformers' LlamaRMSNorm, or GemmaRMSNorm where offset is not 0 (fastft_kernels.reference.rms_norm).
y has the dtype of x under autocast too: the norm is computed in float32 whatever comes in, so no autocast rule is
registered, there being nothing to cast.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.ops import checks, dispatch
from fastft_kernels.reference.rms_norm import rms_norm as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not_triton(x, weight):
    kernel = _KERNELS["triton"]
    longest = kernel.MAX_TRAINED_COLS if weight.requires_grad else kernel.MAX_COLS
    if x.shape[-1] > longest:
        return f"its rows have at most {longest} elements, and these have {x.shape[-1]}"
    return _why_not_dtype(x, weight)


def _why_not_dtype(x, weight):
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return f"it computes float32, bfloat16 and float16, and x is {x.dtype} with a weight of {weight.dtype}"
    return None


_KERNELS = dispatch.register("rms_norm", triton=_why_not_triton, cpp=_why_not_dtype)


# A custom op can return neither None nor one of its inputs: what is not there is an empty tensor.
def _forward(x, weight, eps, offset, residual, backend):
    y, h, rstd = _KERNELS[backend].forward(x, weight, eps, offset, residual)
    return y, x.new_empty(0) if h is None else h, rstd


def _backward(dy, dh, h, weight, rstd, offset, needs_dweight, backend):
    dx, dweight = _KERNELS[backend].backward(dy, dh, h, weight, rstd, offset, needs_dweight)
    return dx, weight.new_empty(0) if dweight is None else dweight


def _setup_context(ctx, inputs, output):
    x, weight, _, offset, residual, backend = inputs
    _, h, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, rstd)
    ctx.offset, ctx.backend = offset, backend
    ctx.mark_non_differentiable(*((h, rstd) if residual is None else (rstd,)))
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, dy, dh):
    """Gradients of the six inputs. `backward` is the function above or the custom op around it."""
    h, weight, rstd = ctx.saved_tensors
    needs_dweight = ctx.needs_input_grad[1]
    dx, dweight = dh, None
    if dy is not None:
        dx, dweight = backward(dy, dh, h, weight, rstd, ctx.offset, needs_dweight, ctx.backend)
    return dx, dweight if needs_dweight else None, None, None, dx if ctx.needs_input_grad[4] else None, None


class _RMSNorm(torch.autograd.Function):
    """The eager path: less than half the dispatch cost of a custom op."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh, _):
        return _gradients(ctx, _backward, dy, dh)


@torch.library.custom_op("fastft::rms_norm", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, weight, eps, offset, residual, backend)


@_op.register_fake
def _(x, weight, eps, offset, residual, backend):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, h, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("fastft::rms_norm_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    needs_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _backward(dy, dh, h, weight, rstd, offset, needs_dweight, backend)


@_backward_op.register_fake
def _(dy, dh, h, weight, rstd, offset, needs_dweight, backend):
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    return dx, weight.new_empty(weight.shape if needs_dweight else 0)


_op.register_autograd(lambda ctx, dy, dh, _: _gradients(ctx, _backward_op, dy, dh), setup_context=_setup_context)


def rms_norm(x, weight, eps=1e-6, *, offset=0.0, residual=None):
    """y, or (y, x + residual) with a residual.

    x, residual, y: [..., cols], floating point, any strides; weight: [cols], any floating dtype.
    Differentiable once in x, weight and residual (any number of times under fastft.backend("reference")).
    Raises ValueError for shapes or dtypes that do not fit, BackendError where the backend asked for cannot serve.
    """
    checks.numbers("rms_norm", eps=eps, offset=offset)
    _check(x, weight, residual)
    backend = dispatch.choose("rms_norm", x, weight)
    if backend == "reference":
        return reference(x, weight, eps, offset, residual)
    run = _op if torch.compiler.is_compiling() else _RMSNorm.apply
    y, h, _ = run(x, weight, eps, offset, residual, backend)
    return y if residual is None else (y, h)


def _check(x, weight, residual):
    checks.tensors("rms_norm", x=x, weight=weight)
    checks.optional_tensors("rms_norm", residual=residual)
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"rms_norm: x is {list(x.shape)} of {x.dtype}; it must be [..., cols] of a floating dtype")
    if weight.shape != x.shape[-1:] or not weight.is_floating_point() or weight.device != x.device:
        raise ValueError(
            f"rms_norm: weight is {list(weight.shape)} of {weight.dtype} on {weight.device}; for x {list(x.shape)} "
            f"it must be [{x.shape[-1]}] of a floating dtype on {x.device}"
        )
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"rms_norm: residual is {list(residual.shape)} of {residual.dtype} on {residual.device}; "
            f"it must be like x: {list(x.shape)} of {x.dtype} on {x.device}"
        )
