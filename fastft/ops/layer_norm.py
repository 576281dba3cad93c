"""LayerNorm, with dropout and a residual that come first: BERT's LayerNorm(residual + dropout(x)) in one pass.

    h = residual + dropout(x)                         (each where asked for)
    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

Rounding follows torch.nn.LayerNorm: everything in float32, y rounded once (fastft_kernels.reference.layer_norm). The mask
of dropout is drawn again in backward (fastft.ops.dropout). y has the dtype of x under autocast too, as rms_norm's.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.ops import checks, dispatch
from fastft.ops.dropout import check_random
from fastft_kernels.reference._philox import drop_threshold, new_seed
from fastft_kernels.reference.layer_norm import layer_norm as reference

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


_KERNELS = dispatch.register("layer_norm", triton=_why_not_triton, cpp=_why_not_dtype)


# A custom op can return neither None nor one of its inputs, nor one result twice: what is not there is an empty tensor.
def _forward(x, weight, bias, eps, residual, dropout_p, seed, backend):
    y, h, mean, rstd = _KERNELS[backend].forward(x, weight, bias, eps, residual, dropout_p, seed)
    return y, x.new_empty(0) if h is None else h, mean, rstd


def _backward(dy, dh, h, weight, mean, rstd, dropout_p, seed, needs, backend):
    dx, dresidual, dweight, dbias = _KERNELS[backend].backward(
        dy, dh, h, weight, mean, rstd, dropout_p, seed, needs[0] and dropout_p > 0, *needs[1:]
    )
    return tuple(h.new_empty(0) if t is None else t for t in (dx, dresidual, dweight, dbias))


def _setup_context(ctx, inputs, output):
    x, weight, _, _, residual, dropout_p, seed, backend = inputs
    _, h, mean, rstd = output
    alone = residual is None and not dropout_p
    ctx.save_for_backward(x if alone else h, weight, mean, rstd, seed)
    ctx.dropout_p, ctx.backend = dropout_p, backend
    ctx.mark_non_differentiable(*((h, mean, rstd) if residual is None else (mean, rstd)))
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, dy, dh):
    """Gradients of the eight inputs. `backward` is the function above or the custom op around it."""
    h, weight, mean, rstd, seed = ctx.saved_tensors
    _, trained, biased, _, added, *_ = ctx.needs_input_grad
    if dy is None and dh is None:
        return (None,) * 8
    dy = torch.zeros_like(h) if dy is None else dy
    needs = [added, trained, biased]
    dx, dresidual, dweight, dbias = backward(dy, dh, h, weight, mean, rstd, ctx.dropout_p, seed, needs, ctx.backend)
    dresidual = dresidual if ctx.dropout_p else dx
    return (
        dx,
        dweight if trained else None,
        dbias if biased else None,
        None,
        dresidual if added else None,
        None,
        None,
        None,
    )


class _LayerNorm(torch.autograd.Function):
    """The eager path: less than half the dispatch cost of a custom op."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh, *_):
        return _gradients(ctx, _backward, dy, dh)


@torch.library.custom_op("fastft::layer_norm", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, weight, bias, eps, residual, dropout_p, seed, backend)


@_op.register_fake
def _(x, weight, bias, eps, residual, dropout_p, seed, backend):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if residual is None and not dropout_p else torch.empty_like(y)
    mean, rstd = (x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for _ in range(2))
    return y, h, mean, rstd


@torch.library.custom_op("fastft::layer_norm_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(dy, dh, h, weight, mean, rstd, dropout_p, seed, needs, backend)


@_backward_op.register_fake
def _(dy, dh, h, weight, mean, rstd, dropout_p, seed, needs, backend):
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dresidual = torch.empty_like(dx) if needs[0] and dropout_p else h.new_empty(0)
    dweight, dbias = (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need else h.new_empty(0)
        for need in needs[1:]
    )
    return dx, dresidual, dweight, dbias


_op.register_autograd(lambda ctx, dy, dh, *_: _gradients(ctx, _backward_op, dy, dh), setup_context=_setup_context)


def layer_norm(x, weight, bias=None, eps=1e-5, *, residual=None, dropout_p=0.0, seed=None):
    """y, or (y, h) with a residual.

    x, residual, y, h: [..., cols], floating point, any strides; weight, bias: [cols], one floating dtype for both.
    dropout_p, seed: of the dropout of x, as in fastft.ops.dropout; from 0 to below 1, and by default a draw from torch's
    CPU generator. Saved for backward: h, mean and rstd of each row, and the seed.
    Differentiable once in x, weight, bias and residual (any number of times under fastft.backend("reference")).
    Raises ValueError for shapes or dtypes that do not fit, BackendError where the backend asked for cannot serve.
    """
    checks.numbers("layer_norm", eps=eps)
    _check(x, weight, bias, residual)
    check_random("layer_norm", dropout_p, seed, "dropout_p")
    backend = dispatch.choose("layer_norm", x, weight)
    dropout_p = dropout_p if drop_threshold(dropout_p) else 0.0
    seed = new_seed(seed) if dropout_p else None
    if backend == "reference":
        return reference(x, weight, bias, eps, residual, dropout_p, seed)
    run = _op if torch.compiler.is_compiling() else _LayerNorm.apply
    y, h, _, _ = run(x, weight, bias, eps, residual, dropout_p, seed, backend)
    return y if residual is None else (y, h)


def _check(x, weight, bias, residual):
    checks.tensors("layer_norm", x=x, weight=weight)
    checks.optional_tensors("layer_norm", bias=bias, residual=residual)
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"layer_norm: x is {list(x.shape)} of {x.dtype}; it must be [..., cols] of a floating dtype")
    if weight.shape != x.shape[-1:] or not weight.is_floating_point() or weight.device != x.device:
        raise ValueError(
            f"layer_norm: weight is {list(weight.shape)} of {weight.dtype} on {weight.device}; for x {list(x.shape)} "
            f"it must be [{x.shape[-1]}] of a floating dtype on {x.device}"
        )
    for name, tensor, like, of in (("bias", bias, weight, "weight"), ("residual", residual, x, "x")):
        facts = (like.shape, like.dtype, like.device)
        if tensor is not None and (tensor.shape, tensor.dtype, tensor.device) != facts:
            raise ValueError(
                f"layer_norm: {name} is {list(tensor.shape)} of {tensor.dtype} on {tensor.device}; "
                f"it must be like {of}: {list(like.shape)} of {like.dtype} on {like.device}"
            )
