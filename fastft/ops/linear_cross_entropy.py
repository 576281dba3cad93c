"""The loss of a language model from its hidden states, without the logits of all positions in memory at once.

    loss = cross_entropy(softcap * tanh((hidden Wᵀ + bias) / softcap), labels)

Rows whose label is ignored are left out first (on CUDA by a caller that knows their number, for asking for it would wait
for the GPU: see `KeptRows`). The others are done in chunks as large as a memory budget allows: the vendor library
multiplies, one kernel turns the chunk's logits into loss, statistics and gradient in place, and two more products take
the gradient to the hidden states and to the head, where these are trained. So all of it happens in the forward pass, and
the backward pass only multiplies by the incoming gradient; with reduction="none", whose incoming gradient differs by
row, it is the backward pass that computes the gradients, from logits that it makes again.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.ops import checks, dispatch
from fastft.ops.cross_entropy import KERNELS, LossStats, check_labels, check_num_items, check_options, share_of
from fastft.ops.linear import native

BUDGET = {"cuda": 2**30, "cpu": 2**28}  # bytes of a chunk's logits
MIN_ROWS, MAX_ROWS = 64, 4096  # of a chunk: products with fewer rows are slow, with more they gain nothing
SLICE = (
    2**24
)  # elements of the head that are multiplied, widened or added up at once, where a product has no fp32 result


class KeptRows:
    """The rows whose label is not ignored. On CUDA their number is fetched while other work is queued: made before a
    model's layers are launched and asked after them, it waits for the labels only, not for the layers.
    """

    def __init__(self, labels, ignore_index=-100):
        kept = labels.flatten() != ignore_index
        if not kept.is_cuda:
            self._index = kept.nonzero().squeeze(1)
            return
        self._index = torch.argsort(~kept, stable=True)
        self._count = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(kept.sum(), non_blocking=True)
        self._ready = torch.cuda.Event()
        self._ready.record()

    def index(self):
        """int64 [n], in order."""
        if not self._index.is_cuda:
            return self._index
        self._ready.synchronize()
        return self._index[: int(self._count)]


def chunk_rows(rows, vocabulary, itemsize, device_type):
    """Rows of a chunk: as many as the budget allows, in chunks of about equal size."""
    most = max(MIN_ROWS, min(MAX_ROWS, BUDGET.get(device_type, BUDGET["cuda"]) // max(1, vocabulary * itemsize)))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _has_no_fp32_result(hidden):
    """Whether a product in half precision is rounded to it, so that fp32 has to be made otherwise."""
    return hidden.device.type == "cpu"


def _slices(weight):
    step = max(1, SLICE // max(1, weight.shape[1]))
    return [slice(i, min(i + step, len(weight))) for i in range(0, len(weight), step)]


def _widens(x):
    """Whether products are taken in fp32 because this CPU has no instructions for the dtype."""
    return x.device.type == "cpu" and not native(x.dtype)


def logits_of(x, weight, bias, out):
    """x Wᵀ + bias into `out` [rows, V]."""
    if _widens(x):
        wide = x.float()
        for s in _slices(weight):
            out[:, s] = wide @ weight[s].float().T
        return out if bias is None else out.add_(bias)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def hidden_gradient(g, weight):
    """g W [rows, H]."""
    if _widens(g):
        return sum(g[:, s].float() @ weight[s].float() for s in _slices(weight)).to(g.dtype)
    return g @ weight


def add_weight_gradient(total, g, x):
    """total + gᵀ x, where `total` [V, H] is fp32 (fp64 for fp64), in place."""
    if g.dtype == total.dtype:
        return total.addmm_(g.T, x)
    if not _has_no_fp32_result(g):
        return torch.addmm(total, g.T, x, out_dtype=torch.float32, out=total)
    for s in _slices(total):
        part = g[:, s].T.float() @ x.float() if _widens(g) else g[:, s].T @ x
        total[s] += part
    return total


def _outputs(hidden, weight, bias, needs_dhidden, needs_dweight, needs_dbias):
    """(loss, log_probs, entropy, correct, dhidden, dweight, dbias), zeros; what is not asked for is empty."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.shape[0]
    return (
        *(hidden.new_zeros(rows, dtype=wide) for _ in range(3)),
        hidden.new_zeros(rows, dtype=torch.bool),
        torch.zeros_like(hidden) if needs_dhidden else hidden.new_empty(0),
        weight.new_zeros(weight.shape if needs_dweight else (0,), dtype=wide),
        weight.new_zeros(weight.shape[:1] if needs_dbias else (0,), dtype=wide),
    )


def _compute(
    hidden,
    weight,
    bias,
    labels,
    scale,
    ignore_index,
    label_smoothing,
    softcap,
    z_loss,
    needs_dhidden,
    needs_dweight,
    needs_dbias,
    backend,
):
    """(loss, log_probs, entropy, correct) per row, and (dhidden, dweight, dbias) of the sum of the rows' losses.

    scale: [rows], what each row's gradient is multiplied by, or None. dweight and dbias are in fp32.
    """
    needs_gradient = needs_dhidden or needs_dweight or needs_dbias
    outputs = _outputs(hidden, weight, bias, needs_dhidden, needs_dweight, needs_dbias)
    loss, log_probs, entropy, correct, dhidden, dweight, dbias = outputs
    kept = None
    if hidden.device.type == "cpu":
        kept = (labels != ignore_index).nonzero().squeeze(1)
        kept = None if len(kept) == len(labels) else kept
    rows, vocabulary = len(labels) if kept is None else len(kept), len(weight)
    if rows == 0 or vocabulary == 0:
        return outputs
    forward = KERNELS[backend].forward
    step = chunk_rows(rows, vocabulary, hidden.element_size(), hidden.device.type)
    buffer = hidden.new_empty(step, vocabulary)
    for start in range(0, rows, step):
        at = slice(start, start + step) if kept is None else kept[start : start + step]
        x, targets = hidden[at], labels[at]
        g = logits_of(x, weight, bias, buffer[: len(x)])
        by = None if scale is None else scale[at]
        results = forward(g, targets, by, ignore_index, label_smoothing, softcap, z_loss, needs_gradient)
        for output, result in zip((loss, log_probs, correct, entropy), results, strict=True):
            output[at] = result
        if needs_dhidden:
            dhidden[at] = hidden_gradient(g, weight)
        if needs_dweight:
            add_weight_gradient(dweight, g, x)
        if needs_dbias:
            dbias += g.sum(0, dtype=dbias.dtype)
    return outputs


@torch.library.custom_op("fastft::linear_cross_entropy", mutates_args=())
def _compute_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _compute(
        hidden,
        weight,
        bias,
        labels,
        scale,
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
        needs_dhidden,
        needs_dweight,
        needs_dbias,
        backend,
    )


@_compute_op.register_fake
def _(
    hidden,
    weight,
    bias,
    labels,
    scale,
    ignore_index,
    smoothing,
    softcap,
    z_loss,
    needs_dhidden,
    needs_dweight,
    needs_dbias,
    backend,
):
    return _outputs(hidden, weight, bias, needs_dhidden, needs_dweight, needs_dbias)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, labels, scale, *ctx.options, dhidden, dweight, dbias, ctx.backend = inputs
    loss, *others = output
    # Computed already: only what was asked for. To be computed by the backward pass: what it takes.
    ctx.computed = dhidden or dweight or dbias
    ctx.save_for_backward(*((*output[4:], scale) if ctx.computed else (hidden, weight, labels, bias)))
    ctx.head_dtypes = weight.dtype, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _gradients(ctx, compute, dloss):
    """Gradients of the thirteen inputs. `compute` is the function above or the custom op around it."""
    nothing = (None,) * 13
    if dloss is None:
        return nothing
    needs = ctx.needs_input_grad[:3]
    if ctx.computed:
        # All rows have the same incoming gradient, for `loss` was summed, and the same scale, which is in there too.
        *saved, scale = ctx.saved_tensors
        by = dloss.new_zeros(()) if len(dloss) == 0 else dloss[0] if scale is None else dloss[0] / scale[0]
    else:
        hidden, weight, labels, bias = ctx.saved_tensors
        saved = compute(hidden, weight, bias, labels, dloss.contiguous(), *ctx.options, *needs, ctx.backend)[4:]
        by = None
    dtypes = (saved[0].dtype, *ctx.head_dtypes)
    results = (scaled(t, by, dtype) if need else None for t, need, dtype in zip(saved, needs, dtypes, strict=True))
    return (*results, *nothing[3:])


def scaled(gradient, by, dtype):
    """gradient * by in `dtype`; a head's is done in slices, for it is large."""
    if by is None:
        return gradient.to(dtype)
    if gradient.dtype == dtype or gradient.dim() < 2:
        return (gradient * by).to(dtype)
    result = torch.empty_like(gradient, dtype=dtype)
    for s in _slices(gradient):
        result[s] = gradient[s] * by
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    """The eager path: less than half the dispatch cost of a custom op."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _compute(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        return _gradients(ctx, _compute, dloss)


_compute_op.register_autograd(lambda ctx, dloss, *_: _gradients(ctx, _compute_op, dloss), setup_context=_setup_context)


def linear_cross_entropy(
    hidden,
    weight,
    labels,
    *,
    bias=None,
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=None,
    z_loss=0.0,
    reduction="mean",
    num_items=None,
    return_stats=False,
):
    """Cross-entropy of the labels under the logits hidden Wᵀ + bias, or (that, LossStats) with `return_stats`.

        z = softcap * tanh(logits / softcap)
        loss of a row = (1 - label_smoothing) * -log_softmax(z)[label] + label_smoothing * mean(-log_softmax(z))
                        + z_loss * logsumexp(z) ** 2

    hidden: [..., H]; weight: [V, H] and bias: [V] of the same dtype (under autocast, of any); labels: int64 [...].
    The loss is in float32: a scalar, or [...] with reduction="none". Rows whose label is `ignore_index` count for nothing.
    reduction: "mean" over the rows that count, "sum", or "none". num_items: with "mean", what the sum is divided by
    instead, a number or a tensor of one element (then nothing waits for the device).
    Differentiable once in hidden, weight and bias.

    Raises ValueError for shapes, dtypes or options that do not fit, and for labels outside [0, V): on the CPU always, on
    CUDA under FASTFT_CHECK=1 (it would wait for the device; without it their loss is NaN). BackendError where the backend
    asked for cannot serve. Where no row counts the loss is 0 with zero gradients; on the CPU a warning says so.
    """
    checks.tensors("linear_cross_entropy", hidden=hidden, weight=weight, labels=labels)
    checks.optional_tensors("linear_cross_entropy", bias=bias)
    checks.flags("linear_cross_entropy", return_stats=return_stats)
    hidden, weight, bias = cast(hidden, weight, bias)
    check_head("linear_cross_entropy", hidden, weight, bias)
    _check(hidden, weight, labels, ignore_index, label_smoothing, softcap, z_loss, reduction, num_items)
    backend = dispatch.choose("cross_entropy", hidden, weight)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    summed = reduction != "none"
    trained = [summed and torch.is_grad_enabled() and t is not None and t.requires_grad for t in (rows, weight, bias)]
    run = _compute_op if torch.compiler.is_compiling() else _LinearCrossEntropy.apply
    options = ignore_index, float(label_smoothing), None if softcap is None else float(softcap), float(z_loss)
    share = scale = None
    if reduction == "mean":
        share = share_of(rows, targets, ignore_index, num_items)
        # In the logits' gradient it costs no rounding of its own, but in float16 the gradient would vanish.
        scale = None if rows.dtype == torch.float16 else share.expand(len(rows))
    loss, log_probs, entropy, correct, *_ = run(rows, weight, bias, targets, scale, *options, *trained, backend)
    if summed:
        loss = loss.sum() if share is None else loss.sum() * share
    else:
        loss = loss.view(labels.shape)
    if not return_stats:
        return loss
    return loss, LossStats(*(t.view(labels.shape) for t in (log_probs, correct, entropy)))


def cast(*tensors):
    """Under autocast, the tensors in its dtype, as a linear layer would take them."""
    device = tensors[0].device.type
    if not checks.autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def check_head(op, hidden, weight, bias=None, name="hidden"):
    """Raises ValueError where hidden states, head and bias do not fit each other."""
    if hidden.dim() == 0 or not hidden.is_floating_point():
        raise ValueError(
            f"{op}: {name} is {list(hidden.shape)} of {hidden.dtype}; it must be [..., H] of a floating dtype"
        )
    like = f"{hidden.dtype} on {hidden.device}"
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or f"{weight.dtype} on {weight.device}" != like:
        raise ValueError(
            f"{op}: weight is {list(weight.shape)} of {weight.dtype} on {weight.device}; for {name} {list(hidden.shape)} "
            f"it must be [V, {hidden.shape[-1]}] of {like}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or f"{bias.dtype} on {bias.device}" != like):
        raise ValueError(
            f"{op}: bias is {list(bias.shape)} of {bias.dtype} on {bias.device}; it must be [{len(weight)}] of {like}"
        )


def _check(hidden, weight, labels, ignore_index, label_smoothing, softcap, z_loss, reduction, num_items):
    op = "linear_cross_entropy"
    check_options(op, ignore_index, label_smoothing, softcap, z_loss, reduction)
    check_num_items(op, num_items, reduction)
    check_labels(op, hidden, labels, ignore_index, len(weight))
