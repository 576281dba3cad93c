"""Rotary position embedding (RoPE) of queries and keys, both in one pass.

    y1 = x1 * cos1 - x2 * sin1        x1, x2: elements j and j + R / 2 of a head, 0 <= j < R / 2
    y2 = x2 * cos2 + x1 * sin2        cos1, cos2, sin1, sin2: elements j and j + R / 2 of the token's cos and sin
    y  = x                            of the elements from R on

Kernels compute in float32 and round once. Backward turns the gradients back, by the transposed rotation, and keeps cos and
sin alone. Results have the dtype of q and k under autocast too: no autocast rule is registered, there being nothing to cast.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.ops import checks, dispatch
from fastft_kernels._layout import rows
from fastft_kernels.reference.rope import rope as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not_triton(q, k, cos, sin):
    longest = _KERNELS["triton"].MAX_HEADS
    count = max(q.numel(), k.numel()) // q.shape[-1]
    return (
        f"it turns at most {longest} heads in a call, and these are {count}"
        if count > longest
        else _why_not(q, k, cos, sin)
    )


def _why_not(q, k, cos, sin):
    if q.dtype not in _DTYPES or cos.dtype not in _DTYPES:
        return f"it computes float32, bfloat16 and float16, and q is {q.dtype} with cos of {cos.dtype}"
    if cos.requires_grad or sin.requires_grad:
        return "cos or sin requires a gradient, which only the reference computes"
    return None


_KERNELS = dispatch.register("rope", triton=_why_not_triton, cpp=_why_not)


def _forward(q, k, cos, sin, unsqueeze_dim, backend):
    return _KERNELS[backend].forward(q, k, cos, sin, unsqueeze_dim)


def _backward(dq, dk, cos, sin, unsqueeze_dim, backend):
    return _KERNELS[backend].backward(dq, dk, cos, sin, unsqueeze_dim)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.unsqueeze_dim, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, backward, dq, dk):
    """Gradients of the six inputs. `backward` is the function above or the custom op around it."""
    dq, dk = backward(dq, dk, *ctx.saved_tensors, ctx.unsqueeze_dim, ctx.backend)
    needs_dq, needs_dk = ctx.needs_input_grad[:2]
    return dq if needs_dq else None, dk if needs_dk else None, None, None, None, None


class _Rope(torch.autograd.Function):
    """The eager path: less than half the dispatch cost of a custom op."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        return _gradients(ctx, _backward, dq, dk)


@torch.library.custom_op("fastft::rope", mutates_args=())
def _op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, backend: str) -> tuple[Tensor, Tensor]:
    return _forward(q, k, cos, sin, unsqueeze_dim, backend)


@torch.library.custom_op("fastft::rope_backward", mutates_args=())
def _backward_op(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, backend: str
) -> tuple[Tensor, Tensor]:
    return _backward(dq, dk, cos, sin, unsqueeze_dim, backend)


@_op.register_fake
@_backward_op.register_fake
def _(q, k, cos, sin, unsqueeze_dim, backend):
    return torch.empty_like(rows(q)), torch.empty_like(rows(k))


_op.register_autograd(lambda ctx, dq, dk: _gradients(ctx, _backward_op, dq, dk), setup_context=_setup_context)


def rope(q, k, cos, sin, *, unsqueeze_dim=1):
    """(q, k) rotated by their positions' angles, as transformers' apply_rotary_pos_emb does.

    q, k: [B, H, S, D] with unsqueeze_dim 1, [B, S, H, D] with 2, packed [T, H, D] with 1 or [H, T, D] with 0; floating
    point, one dtype, any strides; k may have another number of heads. cos, sin: [B or 1, S, R], packed [T, R], where R <= D
    is even; any floating dtype, scaled already (Llama 3, YaRN, linear, dynamic). Elements of a head from R on stay as
    they are. Results lie in memory as q and k do.
    Differentiable once in q and k (under fastft.backend("reference") any number of times, and in cos and sin).
    Raises ValueError for shapes or dtypes that do not fit, BackendError where the backend asked for cannot serve.

    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
    """
    _check(q, k, cos, sin, unsqueeze_dim)
    backend = dispatch.choose("rope", q, k, cos, sin)
    if backend == "reference":
        return reference(q, k, cos, sin, unsqueeze_dim)
    run = _op if torch.compiler.is_compiling() else _Rope.apply
    return run(q, k, cos, sin, unsqueeze_dim, backend)


def _check(q, k, cos, sin, unsqueeze_dim):
    checks.tensors("rope", q=q, k=k, cos=cos, sin=sin)
    checks.whole_numbers("rope", unsqueeze_dim=unsqueeze_dim)
    if q.dim() not in (3, 4) or not q.is_floating_point():
        raise ValueError(
            f"rope: q is {list(q.shape)} of {q.dtype}; it must be [B, H, S, D] or [T, H, D], floating point"
        )
    if unsqueeze_dim not in (q.dim() - 3, q.dim() - 2):
        raise ValueError(
            f"rope: unsqueeze_dim is {unsqueeze_dim}; for q with {q.dim()} dimensions it must be {q.dim() - 3} or "
            f"{q.dim() - 2}, the one that counts the heads"
        )
    others = lambda x: [*x.shape[:unsqueeze_dim], *x.shape[unsqueeze_dim + 1 :]]
    if k.dim() != q.dim() or others(k) != others(q) or (k.dtype, k.device) != (q.dtype, q.device):
        raise ValueError(
            f"rope: k is {list(k.shape)} of {k.dtype} on {k.device}; it must be like q but for its heads: "
            f"{list(q.shape)} of {q.dtype} on {q.device}"
        )
    *tokens, size = others(q)
    for name, x in (("cos", cos), ("sin", sin)):
        shapes = [tokens, [1, *tokens[1:]]] if len(tokens) == 2 else [tokens]
        if list(x.shape[:-1]) not in shapes or x.device != q.device or not x.is_floating_point():
            raise ValueError(
                f"rope: {name} is {list(x.shape)} of {x.dtype} on {x.device}; for q {list(q.shape)} it must be "
                f"{tokens + ['R']} of a floating dtype on {q.device}"
            )
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"rope: cos is {list(cos.shape)} of {cos.dtype}, sin {list(sin.shape)} of {sin.dtype}: they must be alike"
        )
    if not 0 < cos.shape[-1] <= size or cos.shape[-1] % 2:
        raise ValueError(
            f"rope: cos has {cos.shape[-1]} angles; for heads of {size} they must be even in number and at most {size}"
        )
