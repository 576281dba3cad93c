"""Dropout whose mask is drawn again in backward and never stored.

    y = x * keep / keep_probability,   keep ~ Bernoulli(1 - p)

keep is a function of a seed and of the element's place in x (fastft_kernels.reference._philox): every backend drops the
same elements, and all that is saved is the seed. The mask differs from torch's for the same torch.manual_seed; its
distribution does not (p is rounded to a multiple of 2^-16).
"""

import torch
from torch import Tensor

from fastft.ops import checks, dispatch
from fastft_kernels.reference._philox import new_seed
from fastft_kernels.reference.dropout import dropout as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not_dtype(x, *_):
    return None if x.dtype in _DTYPES else f"it computes float32, bfloat16 and float16, and x is {x.dtype}"


_KERNELS = dispatch.register("dropout", triton=_why_not_dtype, cpp=_why_not_dtype)


class _Dropout(torch.autograd.Function):
    """The eager path. Its gradient is dropout of the gradient, so it can be differentiated again."""

    @staticmethod
    def forward(ctx, x, p, seed, backend):
        ctx.p, ctx.seed, ctx.backend = p, seed, backend
        return _KERNELS[backend].dropout(x, p, seed)

    @staticmethod
    def backward(ctx, dy):
        return _Dropout.apply(dy, ctx.p, ctx.seed, ctx.backend), None, None, None


@torch.library.custom_op("fastft::dropout", mutates_args=())
def _op(x: Tensor, p: float, seed: Tensor, backend: str) -> Tensor:
    return _KERNELS[backend].dropout(x, p, seed)


@_op.register_fake
def _(x, p, seed, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, ctx.p, seed, ctx.backend = inputs
    ctx.save_for_backward(seed)


_op.register_autograd(
    lambda ctx, dy: (_op(dy, ctx.p, *ctx.saved_tensors, ctx.backend), None, None, None), setup_context=_setup_context
)


def dropout(x, p, *, seed=None):
    """x with elements dropped, 0 <= p < 1, and the others scaled so that the expectation stays.

    x: any shape, floating, any strides. seed: int or int64 tensor of one on the CPU; the same seed drops the same
    elements. By default it is drawn from torch's CPU generator, so that a recomputation that restores it, as activation
    checkpointing does, drops the same elements. Differentiable any number of times.
    Raises ValueError for another dtype, p or seed, BackendError where a backend that was asked for cannot serve.
    """
    checks.tensors("dropout", x=x)
    if not x.is_floating_point():
        raise ValueError(f"dropout: x is of {x.dtype}; it must be floating")
    check_random("dropout", p, seed)
    backend = dispatch.choose("dropout", x)
    if not p:
        return x
    seed = new_seed(seed)
    if backend == "reference":
        return reference(x, p, seed)
    run = _op if torch.compiler.is_compiling() else _Dropout.apply
    return run(x, p, seed, backend)


def check_random(op, p, seed, name="p"):
    """ValueError unless p is a probability below 1 and seed, where given, an int of 64 bits or a CPU tensor of one."""
    checks.numbers(op, **{name: p})
    if not 0 <= p < 1:
        raise ValueError(f"{op}: {name} is {p}; it must be at least 0 and below 1")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() or seed.device.type != "cpu":
            raise ValueError(
                f"{op}: seed is {list(seed.shape)} of {seed.dtype} on {seed.device}; it must be an int or an int64 "
                f"scalar tensor on cpu"
            )
    elif seed is not None and not (isinstance(seed, int) and -(2**63) <= seed < 2**63):
        raise ValueError(f"{op}: seed is {checks.shown(seed)}; it must be an int of 64 bits")
