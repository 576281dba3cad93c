"""SwiGLU and GEGLU: an activation of one projection gates another, in one pass.

    swiglu(gate, up)                        gate / (1 + exp(-gate)) * up
    geglu(gate, up)                         gate / 2 * (1 + erf(gate / sqrt(2))) * up
    geglu(gate, up, approximate="tanh")     gate / 2 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 gate ** 3))) * up

Kernels compute in float32 and round once, at the end. Backward keeps gate and up alone and computes the activation again.
The result has the dtype of the inputs under autocast too: no autocast rule is registered, there being nothing to cast.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.ops import checks, dispatch
from fastft_kernels.reference.gated_activation import ACTIVATIONS
from fastft_kernels.reference.gated_activation import gated_activation as reference

__all__ = ["ACTIVATIONS", "geglu", "swiglu"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not_dtype(gate, up):
    if gate.dtype not in _DTYPES:
        return f"it computes float32, bfloat16 and float16, and gate is {gate.dtype}"
    return None


_KERNELS = dispatch.register("gated_activation", triton=_why_not_dtype, cpp=_why_not_dtype)


def _forward(gate, up, activation, backend):
    return _KERNELS[backend].forward(gate, up, activation)


def _backward(dy, gate, up, activation, backend):
    return _KERNELS[backend].backward(dy, gate, up, activation)


def _setup_context(ctx, inputs, output):
    gate, up, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx, backward, dy):
    """Gradients of the four inputs. `backward` is the function above or the custom op around it."""
    dgate, dup = backward(dy, *ctx.saved_tensors, ctx.activation, ctx.backend)
    needs_dgate, needs_dup, _, _ = ctx.needs_input_grad
    return dgate if needs_dgate else None, dup if needs_dup else None, None, None


class _GatedActivation(torch.autograd.Function):
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


@torch.library.custom_op("fastft::gated_activation", mutates_args=())
def _op(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    return _forward(gate, up, activation, backend)


@_op.register_fake
def _(gate, up, activation, backend):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastft::gated_activation_backward", mutates_args=())
def _backward_op(dy: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str) -> tuple[Tensor, Tensor]:
    return _backward(dy, gate, up, activation, backend)


@_backward_op.register_fake
def _(dy, gate, up, activation, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))


_op.register_autograd(lambda ctx, dy: _gradients(ctx, _backward_op, dy), setup_context=_setup_context)


def swiglu(gate, up):
    """silu(gate) * up.

    gate, up and the result: [..., cols] of one shape and one floating dtype, any strides. Differentiable once in both
    (any number of times under fastft.backend("reference")).
    Raises ValueError for shapes or dtypes that do not fit, BackendError where the backend asked for cannot serve.
    """
    return _gated("swiglu", gate, up, "silu")


def geglu(gate, up, *, approximate="none"):
    """gelu(gate) * up; approximate="tanh" as in torch.nn.functional.gelu. Otherwise as `swiglu`."""
    checks.choice("geglu", ("none", "tanh"), approximate=approximate)
    return _gated("geglu", gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def _gated(name, gate, up, activation):
    checks.tensors(name, gate=gate, up=up)
    if gate.dim() == 0 or not gate.is_floating_point():
        raise ValueError(
            f"{name}: gate is {list(gate.shape)} of {gate.dtype}; it must be [..., cols] of a floating dtype"
        )
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ValueError(
            f"{name}: up is {list(up.shape)} of {up.dtype} on {up.device}; "
            f"it must be like gate: {list(gate.shape)} of {gate.dtype} on {gate.device}"
        )
    backend = dispatch.choose("gated_activation", gate, up)
    if backend == "reference":
        return reference(gate, up, activation)
    run = _op if torch.compiler.is_compiling() else _GatedActivation.apply
    return run(gate, up, activation, backend)
