"""Cross-entropy of rows of logits, whose gradient takes the place of the logits: no second tensor of their size.

    z = softcap * tanh(logits / softcap)                          (logits themselves without a softcap)
    loss of a row = (1 - label_smoothing) * -log_softmax(z)[label] + label_smoothing * mean(-log_softmax(z))
                    + z_loss * logsumexp(z) ** 2

The forward pass leaves the gradient where the logits were, and the backward pass multiplies it there by the incoming
gradient, unless that is 1. So the logits are used up: autograd is told, and refuses to differentiate what else has saved
them. In a compiled graph, where the compiler decides about memory, they are kept.
What linear_cross_entropy and linear_distillation need of this too is public here: kernels, checks, the share of a row.
"""

import os
import typing
import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.ops import checks, dispatch
from fastft_kernels.reference import cross_entropy as reference

REDUCTIONS = ("mean", "sum", "none")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LossStats(typing.NamedTuple):
    """What the same pass tells of each row, without gradients; zeros where the label is ignored."""

    log_probs: Tensor
    """log-probability of the label, float32"""
    correct: Tensor
    """whether the label is the likeliest token, bool"""
    entropy: Tensor
    """entropy of the distribution, float32"""


def _why_not(x, _):
    if x.dtype not in _DTYPES:
        return f"it computes float32, bfloat16 and float16, and these are {x.dtype}"
    return None


KERNELS = dispatch.register("cross_entropy", triton=_why_not, cpp=_why_not) | {"reference": reference}


def _forward(rows, labels, share, summed, ignore_index, label_smoothing, softcap, z_loss, needs_gradient, backend):
    """(loss, log_probs, entropy, correct), the loss summed and times `share` where asked for; `rows` become their gradient."""
    scale = share.expand(len(rows)) if _shares_in_rows(rows, share) else None
    options = ignore_index, label_smoothing, softcap, z_loss
    loss, log_probs, correct, entropy = KERNELS[backend].forward(rows, labels, scale, *options, needs_gradient)
    if summed:
        loss = loss.sum() if share is None else loss.sum() * share
    return loss, log_probs, entropy, correct


def _shares_in_rows(rows, share):
    """Whether the gradient of the rows has the share in it: no rounding of its own. In float16 it would vanish."""
    return share is not None and rows.dtype != torch.float16


def _factor(ctx, gradient, share, dloss):
    """What the gradient of the rows is still to be multiplied by."""
    if not ctx.summed:
        return dloss[:, None]
    return dloss if share is None or _shares_in_rows(gradient, share) else dloss * share


class _CrossEntropy(torch.autograd.Function):
    """The eager path: less than half the dispatch cost of a custom op, and it may take the place of the logits."""

    @staticmethod
    def forward(ctx, rows, labels, share, summed, inplace, options, needs_gradient, backend):
        buffer = rows if inplace or not needs_gradient else rows.clone(memory_format=torch.contiguous_format)
        loss, *stats = _forward(buffer, labels, share, summed, *options, needs_gradient, backend)
        if needs_gradient and inplace:
            torch.autograd.graph.increment_version(rows)
        ctx.save_for_backward(buffer, share)
        ctx.summed, ctx.inplace = summed, inplace
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        gradient, share = ctx.saved_tensors
        factor = _factor(ctx, gradient, share, dloss)
        if factor.device.type == "cpu" and factor.numel() == 1 and factor.item() == 1:
            pass
        elif ctx.inplace:
            gradient.mul_(factor)
        else:
            gradient = (gradient * factor).to(gradient.dtype)
        return gradient, *(None,) * 7


@torch.library.custom_op("fastft::cross_entropy", mutates_args=())
def _op(
    rows: Tensor,
    labels: Tensor,
    share: Tensor | None,
    summed: bool,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    needs_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    buffer = rows.clone(memory_format=torch.contiguous_format) if needs_gradient else rows
    options = ignore_index, label_smoothing, softcap, z_loss
    results = _forward(buffer, labels, share, summed, *options, needs_gradient, backend)
    return *results, buffer if needs_gradient else rows.new_empty(0)


@_op.register_fake
def _(rows, labels, share, summed, ignore_index, label_smoothing, softcap, z_loss, needs_gradient, backend):
    wide = torch.promote_types(rows.dtype, torch.float32)
    loss, log_probs, entropy = (rows.new_empty(labels.shape, dtype=wide) for _ in range(3))
    gradient = torch.empty_like(rows, memory_format=torch.contiguous_format) if needs_gradient else rows.new_empty(0)
    correct = rows.new_empty(labels.shape, dtype=torch.bool)
    return loss.new_empty(()) if summed else loss, log_probs, entropy, correct, gradient


def _setup_context(ctx, inputs, output):
    _, _, share, ctx.summed, *_ = inputs
    _, *others, gradient = output
    ctx.save_for_backward(gradient, share)
    ctx.mark_non_differentiable(*others, gradient)


def _gradients(ctx, dloss, *_):
    gradient, share = ctx.saved_tensors
    return (gradient * _factor(ctx, gradient, share, dloss)).to(gradient.dtype), *(None,) * 9


_op.register_autograd(_gradients, setup_context=_setup_context)


def cross_entropy(
    logits,
    labels,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=None,
    z_loss=0.0,
    reduction="mean",
    num_items=None,
    return_stats=False,
    inplace=True,
):
    """Cross-entropy of the labels under the logits, or (that, LossStats) with `return_stats`.

    logits: [..., V], floating point; labels: int64 [...]. The loss is in float32 (float64 for float64): a scalar, or [...]
    with reduction="none". Rows whose label is `ignore_index` count for nothing. reduction: "mean" over the rows that
    count, "sum", or "none". num_items: with "mean", what the sum is divided by instead, a number or a tensor of one
    element (then nothing waits for the device).
    inplace: where a gradient is needed, it may take the place of the logits, whose values are then lost: use the
    statistics, or inplace=False. It saves a tensor of their size where the elements of a row are adjacent in memory.
    Differentiable once in logits; with `inplace` a graph that is retained cannot be gone through again.

    Raises ValueError for shapes, dtypes or options that do not fit, for a leaf, or a view of one, whose values would be
    lost, and for labels outside [0, V): on the CPU always, on CUDA under FASTFT_CHECK=1 (it would wait for the device;
    without it their loss is NaN). BackendError where the backend asked for cannot serve. Where no row counts the loss is
    0 with zero gradients; on the CPU a warning says so.
    """
    checks.tensors("cross_entropy", logits=logits, labels=labels)
    checks.flags("cross_entropy", return_stats=return_stats, inplace=inplace)
    _check(logits, labels, ignore_index, label_smoothing, softcap, z_loss, reduction, num_items)
    trained = torch.is_grad_enabled() and logits.requires_grad
    if trained and inplace and _shows_a_leaf(logits):
        raise ValueError(
            "cross_entropy: logits are a leaf, or a view of one, whose values would be lost; pass inplace=False to keep them"
        )
    backend = dispatch.choose("cross_entropy", logits, logits)
    rows, targets = logits.reshape(labels.numel(), logits.shape[-1]), labels.reshape(-1)
    apart = rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]  # no two rows share memory, as expanded ones do
    rows = rows if apart else rows.contiguous()
    share = share_of(rows, targets, ignore_index, num_items) if reduction == "mean" else None
    summed, softcap = reduction != "none", None if softcap is None else float(softcap)
    options = ignore_index, float(label_smoothing), softcap, float(z_loss)
    if torch.compiler.is_compiling():
        loss, *stats, _ = _op(rows, targets, share, summed, *options, trained, backend)
    else:
        loss, *stats = _CrossEntropy.apply(rows, targets, share, summed, inplace, options, trained, backend)
    loss = loss if summed else loss.view(labels.shape)
    if not return_stats:
        return loss
    log_probs, entropy, correct = (t.view(labels.shape) for t in stats)
    return loss, LossStats(log_probs, correct, entropy)


def _shows_a_leaf(logits):
    """Whether it is a leaf or, where the gradient takes its place, a view of one."""
    return logits.is_leaf or (not torch.compiler.is_compiling() and logits._is_view() and logits._base.is_leaf)


def share_of(rows, targets, ignore_index, num_items):
    """What a row counts for in a mean: a tensor, made without waiting for the device."""
    like = {"dtype": torch.promote_types(rows.dtype, torch.float32), "device": rows.device}
    if num_items is None:
        return (targets != ignore_index).sum().clamp(min=1).to(like["dtype"]).reciprocal()
    if isinstance(num_items, Tensor):
        return num_items.reshape(()).to(**like, non_blocking=True).reciprocal()
    return torch.full((), 1 / num_items, **like)


def check_labels(op, x, labels, ignore_index, vocabulary, name="hidden"):
    """Raises ValueError for labels of another shape, dtype or device than x asks for, and where it costs no waiting for
    wrong values."""
    if labels.shape != x.shape[:-1] or labels.dtype != torch.int64 or labels.device != x.device:
        raise ValueError(
            f"{op}: labels are {list(labels.shape)} of {labels.dtype} on {labels.device}; for {name} "
            f"{list(x.shape)} they must be {list(x.shape[:-1])} of torch.int64 on {x.device}"
        )
    if torch.compiler.is_compiling() or (labels.device.type != "cpu" and os.environ.get("FASTFT_CHECK") != "1"):
        return
    kept = labels != ignore_index
    wrong = labels[kept & ((labels < 0) | (labels >= vocabulary))]
    if len(wrong):
        raise ValueError(
            f"{op}: a label is {int(wrong[0])}; labels must be in [0, {vocabulary}), or {ignore_index} where ignored"
        )
    if labels.numel() and not kept.any():
        warnings.warn(
            f"{op}: every label is {ignore_index}, ignored: the loss is 0, and so are its gradients", stacklevel=4
        )


def check_options(op, ignore_index, label_smoothing, softcap, z_loss, reduction):
    """Raises ValueError or TypeError for options that cannot be, whatever the tensors."""
    checks.choice(op, REDUCTIONS, reduction=reduction)
    checks.whole_numbers(op, ignore_index=ignore_index)
    checks.numbers(op, label_smoothing=label_smoothing, z_loss=z_loss)
    checks.optional_numbers(op, softcap=softcap)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}; it must be in [0, 1]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap is {softcap}; it must be positive, or None for none")
    if not z_loss >= 0:
        raise ValueError(f"{op}: z_loss is {z_loss}; it must not be negative")


def check_num_items(op, num_items, reduction):
    """Raises ValueError or TypeError unless it is a positive number, or a tensor of one element, and goes with a mean."""
    if num_items is not None and reduction != "mean":
        raise ValueError(f"{op}: num_items is what a mean is divided by; with reduction={reduction!r} leave it out")
    if not isinstance(num_items, Tensor):
        checks.optional_numbers(op, num_items=num_items)
    if num_items is not None and not isinstance(num_items, Tensor) and not num_items > 0:
        raise ValueError(f"{op}: num_items is {num_items}; it must be positive")
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"{op}: num_items is {list(num_items.shape)}; it must be a number or a tensor of one element")


def _check(logits, labels, ignore_index, label_smoothing, softcap, z_loss, reduction, num_items):
    op = "cross_entropy"
    if logits.dim() == 0 or not logits.is_floating_point():
        raise ValueError(
            f"{op}: logits are {list(logits.shape)} of {logits.dtype}; they must be [..., V] of a floating dtype"
        )
    check_options(op, ignore_index, label_smoothing, softcap, z_loss, reduction)
    check_num_items(op, num_items, reduction)
    check_labels(op, logits, labels, ignore_index, logits.shape[-1], "logits")
