"""Linear layers with a low-rank update (LoRA) at little more than the cost of the frozen product.

    lora_linear   y = x Wᵀ + b + scale * drop(x) Aᵀ Bᵀ
    lora_group    several such layers of the same x: q, k and v; gate and up
    lora_mlp      down(act(gate(x)) * up(x))

A layer that has a magnitude is DoRA's: fastft/ops/dora.py.

Low rank first: S = x Aᵀ is taken once for all layers of a group, y = scale * S Bᵀ + b is written once, and the frozen
product is accumulated into it (cuBLAS and oneDNN: beta = 1). Backward takes dS = scale * dy B once, for dA and dx.
Saved: x, the parameters themselves and S [tokens, sum of r]; by lora_mlp also gate(x) and up(x). Each layer has a dropout
mask of its own, which is drawn again from its seed; the division by the probability to be kept is part of `scale`.

The products are PyTorch's: in fp32 on a CPU without instructions for half precision (reference/linear.py).
A and B may be wider than x, as PEFT keeps them: they are rounded to the dtype of the product, x never is.
W may be an NF4Weight (fastft.ops.nf4): it is read from its 4 bits where the product is taken, in forward and backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.ops import dispatch, dora
from fastft.ops.lora_arguments import as_they_are, enter, plain
from fastft.ops.lora_composed import composed
from fastft.ops.lora_mask import KERNELS, apply_mask
from fastft.ops.nf4 import NF4Weight, dense, product_dtype
from fastft_kernels.reference import lora as reference


def _fused(backend, kernel, *arguments):
    """What this kernel of the backend computes; None where there is none, or it leaves the work to PyTorch's products."""
    run = getattr(KERNELS.get(backend), kernel, None)
    return None if run is None else run(*arguments)


# A group is five lists, one entry a layer; `seeds` int64 [layers], of no meaning where p is 0.
def _group_forward(x, weights, biases, lora_a, lora_b, scales, p, seeds, backend):
    """[*ys, S]: y [..., out] of each layer, S [tokens, sum of r] in the dtype of the products."""
    dtype, scales = product_dtype(x), _with_dropout(scales, p)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    S = _fused(backend, "low_rank", rows, [a.to(dtype) for a in lora_a], p, seeds)
    if S is None and p:
        S = torch.cat(
            [apply_mask(rows, p, s, backend) @ a.to(dtype).t() for a, s in zip(lora_a, seeds, strict=True)], 1
        )
    elif S is None:
        S = rows @ _stack(lora_a, dtype).t()
    ys = []
    for W, bias, B, scale, low in zip(weights, biases, lora_b, scales, _split(S, lora_a), strict=True):
        W, B = dense(W, dtype), (B * scale).to(dtype)
        y = _fused(backend, "product", rows, W, bias, low, B)
        if y is None:
            y = low @ B.t() if bias is None else torch.addmm(bias.to(dtype), low, B.t())
            y.addmm_(rows, W.t())
        ys.append(y.to(x.dtype).view(*x.shape[:-1], W.shape[0]))
    return [*ys, S]


def _group_backward(dys, x, S, weights, lora_a, lora_b, scales, p, seeds, backend, needs):
    """(dx, dweights, dbiases, das, dbs), None where `needs`, of the same form, says that nobody asks.

    dys: the gradient of each y, None where nothing depends on it.
    """
    dtype, scales = S.dtype, _with_dropout(scales, p)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    needs_dx, needs_dweight, needs_dbias, needs_da, needs_db = needs
    layers = len(weights)
    dweights, dbiases, das, dbs = ([None] * layers for _ in range(4))
    dlows, dx = [None] * layers, None
    for i, (dy, low) in enumerate(zip(dys, _split(S, lora_a), strict=True)):
        if dy is None:
            continue
        dys[i] = dy = dy.reshape(-1, dy.shape[-1]).to(dtype)
        db = None
        if needs_dx or needs_da[i]:
            B = (lora_b[i] * scales[i]).to(dtype)
            both = _fused(backend, "gradients", dy, low, B) if needs_db[i] else None
            dlows[i], db = both or (dy @ B, None)
        if needs_db[i]:
            db = low.t() @ dy if db is None else db.t()
            dbs[i] = (db * scales[i]).t().to(lora_b[i].dtype).contiguous()
        if needs_dweight[i]:
            dweights[i] = (dy.t() @ rows).to(weights[i].dtype)
        if needs_dbias[i]:
            dbiases[i] = dy.sum(0)
    live = [i for i in range(layers) if dlows[i] is not None]
    trained = [i for i in live if needs_da[i]]
    of = lambda part, chosen: [part[i] for i in chosen]
    if trained:
        for i, da in zip(trained, _das(rows, of(dlows, trained), p, of(seeds, trained), backend), strict=True):
            das[i] = da.to(lora_a[i].dtype, copy=True)
    if needs_dx and live:
        lists = of(dys, live), of(weights, live), of(dlows, live), [lora_a[i].to(dtype) for i in live]
        dx = _dx(*lists, p, of(seeds, live), backend).to(x.dtype).view(x.shape)
    return dx, dweights, dbiases, das, dbs


def _das(rows, dlows, p, seeds, backend):
    """dSᵀ drop(x) of each layer."""
    das = _fused(backend, "adapter_gradients", rows, dlows, p, seeds)
    if das is not None:
        return das
    if p:
        return [dlow.t() @ apply_mask(rows, p, seed, backend) for dlow, seed in zip(dlows, seeds, strict=True)]
    return (torch.cat(dlows, 1).t() @ rows).split([dlow.shape[1] for dlow in dlows])


def _dx(dys, weights, dlows, lora_a, p, seeds, backend):
    """sum of dy W + keep * (dS A)."""
    dtype, dx = dlows[0].dtype, None
    if len(weights) == 1 or not any(isinstance(W, NF4Weight) for W in weights):  # 4-bit ones are dense one at a time
        weights = [dense(W, dtype) for W in weights]
        dx = _fused(backend, "input_gradient", dys, weights, dlows, lora_a, p, seeds)
    if dx is None:
        dx = _branch(dlows, lora_a, p, seeds, backend)
        for dy, W in zip(dys, weights, strict=True):
            dx.addmm_(dy, dense(W, dtype))
    return dx


def _branch(dlows, lora_a, p, seeds, backend):
    """sum of keep * (dS A)."""
    dx = _fused(backend, "branch", dlows, lora_a, p, seeds)
    if dx is None and not p:
        return torch.cat(dlows, 1) @ _stack(lora_a, dlows[0].dtype)
    if dx is None:
        for dlow, a, seed in zip(dlows, lora_a, seeds, strict=True):
            branch = apply_mask(dlow @ a, p, seed, backend)
            dx = (branch.float() if len(dlows) > 1 else branch) if dx is None else dx.add_(branch)
    return dx.to(dlows[0].dtype)


def _with_dropout(scales, p):
    return [scale / reference.keep_probability(p) for scale in scales]


def _stack(lora_a, dtype):
    return torch.cat([a.to(dtype) for a in lora_a]) if len(lora_a) > 1 else lora_a[0].to(dtype)


def _split(S, lora_a):
    return S.split([a.shape[0] for a in lora_a], 1)


class _Group(torch.autograd.Function):
    """The eager path: parameters come one by one, as autograd wants them."""

    @staticmethod
    def forward(ctx, x, scales, p, seeds, backend, *parameters):
        weights, biases, lora_a, lora_b = _lists(parameters, 4)
        *ys, S = _group_forward(x, weights, biases, lora_a, lora_b, scales, p, seeds, backend)
        _save(ctx, x, S, seeds, parameters, scales, p, backend)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        needs_dx, needs = ctx.needs_input_grad[0], _lists(ctx.needs_input_grad[5:], 4)
        x, S, weights, lora_a, lora_b, seeds = _saved(ctx)
        arguments = S, weights, lora_a, lora_b, ctx.scales, ctx.p, seeds, ctx.backend, (needs_dx, *needs)
        dx, *gradients = _group_backward(list(dys), x, *arguments)
        return dx, None, None, None, None, *(_like(g, d) for g, d in zip(sum(gradients, []), ctx.dtypes, strict=True))


def _save(ctx, x, S, seeds, parameters, scales, p, backend):
    weights, _, lora_a, lora_b = _lists(parameters, 4)
    ctx.save_for_backward(x, S, seeds, *_tensors(ctx, weights), *lora_a, *lora_b)
    ctx.dtypes = [None if t is None else t.dtype for t in parameters]
    ctx.scales, ctx.p, ctx.backend = scales, p, backend


def _saved(ctx):
    x, S, seeds, *parameters = ctx.saved_tensors
    weights, lora_a, lora_b = _lists(parameters, 3)
    return x, S, _weights(ctx, weights), lora_a, lora_b, seeds


def _tensors(ctx, weights):
    """What autograd saves of the weights: NF4Weights, which are not tensors, are kept on `ctx`."""
    ctx.quantized = [W if isinstance(W, NF4Weight) else None for W in weights]
    return [None if isinstance(W, NF4Weight) else W for W in weights]


def _weights(ctx, tensors):
    return [W if t is None else t for t, W in zip(tensors, ctx.quantized, strict=True)]


def _lists(flat, count):
    layers = len(flat) // count
    return [list(flat[i * layers : (i + 1) * layers]) for i in range(count)]


def _like(gradient, dtype):
    return None if gradient is None else gradient.to(dtype)


@torch.library.custom_op("fastft::lora_group", mutates_args=())
def _group_op(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    p: float,
    seeds: Tensor,
    backend: str,
) -> list[Tensor]:
    return _group_forward(x, weights, _present(biases), lora_a, lora_b, scales, p, seeds, backend)


@_group_op.register_fake
def _(x, weights, biases, lora_a, lora_b, scales, p, seeds, backend):
    ys = [x.new_empty(*x.shape[:-1], W.shape[0]) for W in weights]
    S = x.new_empty(x.shape[:-1].numel(), sum(a.shape[0] for a in lora_a), dtype=product_dtype(x))
    return [*ys, S]


@torch.library.custom_op("fastft::lora_group_backward", mutates_args=())
def _group_backward_op(
    dys: list[Tensor],
    x: Tensor,
    S: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    p: float,
    seeds: Tensor,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    arguments = S, weights, lora_a, lora_b, scales, p, seeds, backend, (needs[0], *_lists(needs[1:], 4))
    dx, *gradients = _group_backward(list(dys), x, *arguments)
    return [_tensor(x, gradient) for gradient in (dx, *sum(gradients, []))]


@_group_backward_op.register_fake
def _(dys, x, S, weights, lora_a, lora_b, scales, p, seeds, backend, needs):
    biases = [S.new_empty(W.shape[0]) for W in weights]
    like = [x, *weights, *biases, *lora_a, *lora_b]
    return [t.new_empty(t.shape if need else 0) for t, need in zip(like, needs, strict=True)]


def _setup_context(ctx, inputs, output):
    x, weights, biases, lora_a, lora_b, scales, p, seeds, backend = inputs
    _save(ctx, x, output[-1], seeds, [*weights, *biases, *lora_a, *lora_b], scales, p, backend)
    ctx.needs = [x.requires_grad, *(t.requires_grad for t in (*weights, *biases, *lora_a, *lora_b))]


def _compiled_backward(ctx, gradients):
    x, S, weights, lora_a, lora_b, seeds = _saved(ctx)
    outs = [W.shape[0] for W in weights]
    dys = [x.new_zeros(*x.shape[:-1], n) if g is None else g for g, n in zip(gradients[:-1], outs, strict=True)]
    arguments = S, weights, lora_a, lora_b, ctx.scales, ctx.p, seeds, ctx.backend, ctx.needs
    dx, *gradients = _group_backward_op(dys, x, *arguments)
    gradients = [_like(g, d) if n else None for g, d, n in zip(gradients, ctx.dtypes, ctx.needs[1:], strict=True)]
    return dx if ctx.needs[0] else None, *_lists(gradients, 4), None, None, None, None


_group_op.register_autograd(_compiled_backward, setup_context=_setup_context)


# A custom op takes no list of optional tensors and returns no None: what is not there is an empty tensor.
def _present(tensors):
    return [t if t.numel() else None for t in tensors]


def _tensor(like, t):
    return like.new_empty(0) if t is None else t


def lora_linear(x, weight, bias, lora_a, lora_b, scale, magnitude=None, *, dropout_p=0.0, seed=None):
    """y = x Wᵀ + b + scale * drop(x) Aᵀ Bᵀ; with a magnitude DoRA's, as fastft.ops.dora says.

    x: [..., in], any strides; weight: [out, in] of x's dtype, or an NF4Weight; bias: [out] or None; lora_a: [r, in],
    lora_b: [out, r], magnitude: [out] or None, any floating dtype; y: [..., out]. Under autocast x, weight and y are cast as
    in torch's linear.
    dropout_p: 0 <= p < 1, on the update alone. seed: an int that decides the mask; by default it is drawn from
    torch's CPU generator, so that a recomputation which restores it, as activation checkpointing does, sees the same.
    Differentiable once in x, weight, bias, lora_a, lora_b and magnitude (any number of times under
    fastft.backend("reference")).
    Raises ValueError for shapes or dtypes that do not fit, BackendError where the backend asked for cannot serve.
    """
    seeds, layer = None if seed is None else [seed], (weight, bias, lora_a, lora_b, scale, magnitude)
    return lora_group(x, [layer], dropout_p=dropout_p, seeds=seeds)[0]


def lora_group(x, layers, *, dropout_p=0.0, seeds=None):
    """[lora_linear(x, *layer) for layer in layers], reading x and writing dx once for all of them.

    layers: a sequence of (weight, bias, lora_a, lora_b, scale[, magnitude]). seeds: a sequence of ints, one for each layer.
    """
    x, layers, seeds, backend = enter("lora_group", x, layers, dropout_p, seeds)
    if dispatch.requested() == "reference":
        pairs = zip(layers, seeds, strict=True)
        return [reference.lora_linear(x, *plain(layer, x), dropout_p, seed) for layer, seed in pairs]
    return run(x, layers, dropout_p, seeds, backend)


def run(x, layers, p, seeds, backend):
    """[y of each layer], of what `enter` gives, by kernels."""
    norms = [None if m is None else dora.row_norms(x, W, a, b, scale, m) for W, _, a, b, scale, m in layers]
    has_magnitude, is_compiling = any(n is not None for n in norms), torch.compiler.is_compiling()
    if is_compiling and (p and has_magnitude or any(isinstance(layer[0], NF4Weight) for layer in layers)):
        triples = zip(layers, norms, seeds, strict=True)
        return [composed(x, *layer, n, p, seed, backend) for layer, n, seed in triples]
    if p and has_magnitude:
        triples = zip(layers, norms, seeds.split(1), strict=True)
        return [_alone(x, layer, n, p, seed, backend) for layer, n, seed in triples]
    weights, biases, lora_a, lora_b, scales, magnitudes = map(list, zip(*layers, strict=True))
    inside = [bias if m is None else None for bias, m in zip(biases, magnitudes, strict=True)]
    if is_compiling:
        inside = [_tensor(x, bias) for bias in inside]
        ys = _group_op(x, weights, inside, lora_a, lora_b, scales, p, seeds, backend)[:-1]
    else:
        with as_they_are(x):
            ys = _Group.apply(x, scales, p, seeds, backend, *weights, *inside, *lora_a, *lora_b)
    return [
        y if m is None else dora.scaled(y, m, n, bias, backend)
        for y, m, n, bias in zip(ys, magnitudes, norms, biases, strict=True)
    ]


def _alone(x, layer, norms, p, seed, backend):
    """One layer of a group that has dropout and a magnitude somewhere."""
    if norms is None:
        return run(x, [layer], p, seed, backend)[0]
    with as_they_are(x):
        return dora.dropped(x, *layer, norms, p, seed, backend)
