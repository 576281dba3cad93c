"""The gated MLP of Llama, Gemma and their descendants with a low-rank update on its three layers, as one op.

    y = down(act(gate(x)) * up(x)),   each layer as in fastft.ops.lora_linear, act as in fastft.ops.gated_activation

Saved: x, gate(x), up(x), the parameters themselves and the low-rank products [tokens, sum of r]. act(gate(x)) * up(x) is
computed again for the gradient of down's A.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.ops import checks, dispatch, gated_activation, lora
from fastft.ops.lora_arguments import as_they_are, enter, plain
from fastft.ops.nf4 import NF4Weight, product_dtype
from fastft_kernels.reference.gated_activation import ACTIVATIONS, activate
from fastft_kernels.reference.lora import lora_mlp as reference

_SLOPES = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda dy, gate: torch.ops.aten.gelu_backward(dy, gate, approximate="tanh"),
}
"""gradient of the activation, where no kernel serves"""


# The element-wise part. act: (activation, the backend that gates).
def _gated(gate, up, act):
    activation, backend = act
    if backend == "reference":
        return activate(gate, activation).mul_(up)
    return gated_activation._forward(gate, up, activation, backend)


def _gated_backward(dh, gate, up, act):
    activation, backend = act
    if backend == "reference":
        return _SLOPES[activation](dh * up, gate), activate(gate, activation).mul_(dh)
    return gated_activation._backward(dh, gate, up, activation, backend)


def _forward(x, weights, biases, lora_a, lora_b, scales, p, seeds, act, backend):
    """[y, S of gate and up, gate(x), up(x), S of down]; lists of three: gate, up, down."""
    first, last = slice(0, 2), slice(2, 3)
    lists = weights, biases, lora_a, lora_b, scales
    gate, up, S = lora._group_forward(x, *(part[first] for part in lists), p, seeds[first], backend)
    y, S_down = lora._group_forward(_gated(gate, up, act), *(part[last] for part in lists), p, seeds[last], backend)
    return [y, S, gate, up, S_down]


def _backward(dy, x, S, gate, up, S_down, weights, lora_a, lora_b, scales, p, seeds, act, backend, needs):
    """(dx, dweights, dbiases, das, dbs), None where `needs`, of the same form, says that nobody asks."""
    first, last = slice(0, 2), slice(2, 3)
    lists = weights, lora_a, lora_b, scales
    through = needs[0] or any(any(part[first]) for part in needs[1:])
    inner_needs = through, *(part[last] for part in needs[1:])
    reads_h = needs[1][2] or needs[3][2]
    h = _gated(gate, up, act) if reads_h else gate  # else only its shape and dtype are asked for
    arguments = *(part[last] for part in lists), p, seeds[last], backend, inner_needs
    dh, *ours = lora._group_backward([dy], h, S_down, *arguments)
    dx, theirs = None, [[None, None] for _ in range(4)]
    if through:
        dys = list(_gated_backward(dh, gate, up, act))
        arguments = *(part[first] for part in lists), p, seeds[first], backend
        dx, *theirs = lora._group_backward(dys, x, S, *arguments, (needs[0], *(part[first] for part in needs[1:])))
    return dx, *(a + b for a, b in zip(theirs, ours, strict=True))


class _MLP(torch.autograd.Function):
    """The eager path: parameters come one by one, as autograd wants them."""

    @staticmethod
    def forward(ctx, x, scales, p, seeds, act, backend, *parameters):
        y, *kept = _forward(x, *lora._lists(parameters, 4), scales, p, seeds, act, backend)
        _save(ctx, x, kept, seeds, parameters, scales, p, act, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[0], *lora._lists(ctx.needs_input_grad[6:], 4)
        dx, *gradients = _backward(dy, *_saved(ctx), needs)
        flat = (lora._like(g, d) for g, d in zip(sum(gradients, []), ctx.dtypes, strict=True))
        return dx, None, None, None, None, None, *flat


def _save(ctx, x, kept, seeds, parameters, scales, p, act, backend):
    weights, _, lora_a, lora_b = lora._lists(parameters, 4)
    ctx.save_for_backward(x, *kept, seeds, *lora._tensors(ctx, weights), *lora_a, *lora_b)
    ctx.dtypes = [None if t is None else t.dtype for t in parameters]
    ctx.scales, ctx.p, ctx.act, ctx.backend = scales, p, act, backend


def _saved(ctx):
    """The arguments of _backward after dy, but for `needs`."""
    x, S, gate, up, S_down, seeds, *parameters = ctx.saved_tensors
    weights, lora_a, lora_b = lora._lists(parameters, 3)
    weights = lora._weights(ctx, weights)
    return x, S, gate, up, S_down, weights, lora_a, lora_b, ctx.scales, ctx.p, seeds, ctx.act, ctx.backend


@torch.library.custom_op("fastft::lora_mlp", mutates_args=())
def _op(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    p: float,
    seeds: Tensor,
    activation: str,
    gating: str,
    backend: str,
) -> list[Tensor]:
    act = activation, gating
    return _forward(x, weights, lora._present(biases), lora_a, lora_b, scales, p, seeds, act, backend)


@_op.register_fake
def _(x, weights, biases, lora_a, lora_b, scales, p, seeds, activation, gating, backend):
    rows, dtype = x.shape[:-1].numel(), product_dtype(x)
    gate, up, y = (x.new_empty(*x.shape[:-1], W.shape[0]) for W in weights)
    r_gate, r_up, r_down = (a.shape[0] for a in lora_a)
    return [y, x.new_empty(rows, r_gate + r_up, dtype=dtype), gate, up, x.new_empty(rows, r_down, dtype=dtype)]


@torch.library.custom_op("fastft::lora_mlp_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    S: Tensor,
    gate: Tensor,
    up: Tensor,
    S_down: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    p: float,
    seeds: Tensor,
    activation: str,
    gating: str,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    arguments = x, S, gate, up, S_down, weights, lora_a, lora_b, scales, p, seeds, (activation, gating), backend
    dx, *gradients = _backward(dy, *arguments, (needs[0], *lora._lists(needs[1:], 4)))
    return [lora._tensor(x, gradient) for gradient in (dx, *sum(gradients, []))]


@_backward_op.register_fake
def _(dy, x, S, gate, up, S_down, weights, lora_a, lora_b, scales, p, seeds, activation, gating, backend, needs):
    biases = [S.new_empty(W.shape[0]) for W in weights]
    like = [x, *weights, *biases, *lora_a, *lora_b]
    return [t.new_empty(t.shape if need else 0) for t, need in zip(like, needs, strict=True)]


def _setup_context(ctx, inputs, output):
    x, weights, biases, lora_a, lora_b, scales, p, seeds, *act, backend = inputs
    _save(ctx, x, output[1:], seeds, [*weights, *biases, *lora_a, *lora_b], scales, p, act, backend)
    ctx.needs = [x.requires_grad, *(t.requires_grad for t in (*weights, *biases, *lora_a, *lora_b))]


def _compiled_backward(ctx, gradients):
    *saved, act, backend = _saved(ctx)
    dx, *flat = _backward_op(gradients[0], *saved, *act, backend, ctx.needs)
    flat = [lora._like(g, d) if n else None for g, d, n in zip(flat, ctx.dtypes, ctx.needs[1:], strict=True)]
    return dx if ctx.needs[0] else None, *lora._lists(flat, 4), None, None, None, None, None, None


_op.register_autograd(_compiled_backward, setup_context=_setup_context)


def lora_mlp(x, gate, up, down, *, activation="silu", dropout_p=0.0, seeds=None):
    """y = down(act(gate(x)) * up(x)), each layer with its low-rank update.

    x: [..., in]; gate, up: (weight [inner, in], bias, lora_a, lora_b, scale[, magnitude]); down: the same with weight
    [out, inner]. With magnitudes it is three ops, and what they save.
    activation: "silu", "gelu" or "gelu_tanh". seeds: three ints. Everything else as in fastft.ops.lora_linear.
    """
    checks.choice("lora_mlp", ACTIVATIONS, activation=activation)
    x, layers, seeds, backend = enter("lora_mlp", x, [gate, up, down], dropout_p, seeds, inner=2)
    if dispatch.requested() == "reference":
        return reference(x, *(plain(layer, x) for layer in layers), activation, dropout_p, seeds)
    is_compiling = torch.compiler.is_compiling()
    if any(layer[5] is not None or is_compiling and isinstance(layer[0], NF4Weight) for layer in layers):
        gate, up = lora.run(x, layers[:2], dropout_p, seeds[:2], backend)
        h = gated_activation._gated("lora_mlp", gate, up, activation)
        return lora.run(h, layers[2:], dropout_p, seeds[2:], backend)[0]
    weights, biases, lora_a, lora_b, scales, _ = map(list, zip(*layers, strict=True))
    act = activation, dispatch.choose("gated_activation", x, x)
    if is_compiling:
        biases = [lora._tensor(x, bias) for bias in biases]
        return _op(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds, *act, backend)[0]
    with as_they_are(x):
        return _MLP.apply(x, scales, dropout_p, seeds, act, backend, *weights, *biases, *lora_a, *lora_b)
