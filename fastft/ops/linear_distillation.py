"""Distillation from a teacher's hidden states and head, without the logits of either for all positions at once.

    p = softmax(teacher_hidden teacher_weightᵀ / temperature),  q = softmax(hidden weightᵀ / temperature)

    forward_kl   sum(p * log(p / q))                                        the student covers what the teacher does
    reverse_kl   sum(q * log(q / p))                                        the student seeks what the teacher prefers
    js           (sum(p * log(p / m)) + sum(q * log(q / m))) / 2            with m = (p + q) / 2

Chunks, products and what the backward pass is left with are as in linear_cross_entropy; the divergence of a chunk and its
gradient are taken in fp32 by PyTorch.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.ops import checks
from fastft.ops.cross_entropy import REDUCTIONS, check_labels, check_num_items
from fastft.ops.linear_cross_entropy import (
    add_weight_gradient,
    cast,
    check_head,
    chunk_rows,
    hidden_gradient,
    logits_of,
    scaled,
)

DIVERGENCES = ("forward_kl", "reverse_kl", "js")
TEMPORARIES = 8  # fp32 tensors of a chunk's size that are alive at once


def _divergence(log_p, log_q, divergence):
    """(divergence of each row, its gradient in the student's logits over the temperature); log_p and log_q: [rows, V]."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        return _sum(p, log_p - log_q), q - p
    if divergence == "reverse_kl":
        ratio = log_q - log_p
        value = _sum(q, ratio)
        return value, _product(q, ratio - value[:, None])
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    ratio = log_q - log_m
    student = _sum(q, ratio)
    return (_sum(p, log_p - log_m) + student) / 2, _product(q, ratio - student[:, None]) / 2


def _product(p, x):
    """p * x, and 0 where p is: not 0 * inf of a token that one of both forbids."""
    return torch.where(p > 0, p * x, 0)


def _sum(p, x):
    return _product(p, x).sum(1)


def _outputs(hidden, weight, needs_dhidden, needs_dweight):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_zeros(hidden.shape[0], dtype=wide),
        torch.zeros_like(hidden) if needs_dhidden else hidden.new_empty(0),
        weight.new_zeros(weight.shape if needs_dweight else (0,), dtype=wide),
    )


def _compute(
    hidden, weight, teacher_hidden, teacher_weight, kept, scale, divergence, temperature, needs_dhidden, needs_dweight
):
    """(loss per row, dhidden, dweight): gradients of the sum of the rows' losses, or of its weighting by `scale` [rows].

    kept: bool [rows]; the other rows give zeros.
    """
    loss, dhidden, dweight = outputs = _outputs(hidden, weight, needs_dhidden, needs_dweight)
    index = kept.nonzero().squeeze(1) if hidden.device.type == "cpu" else torch.arange(len(kept), device=kept.device)
    rows, vocabulary = len(index), len(weight)
    if rows == 0 or vocabulary == 0:
        return outputs
    step = chunk_rows(rows, vocabulary, TEMPORARIES * loss.element_size(), hidden.device.type)
    for start in range(0, rows, step):
        at = index[start : start + step]
        x, counts = hidden[at], kept[at]
        g = logits_of(x, weight, None, hidden.new_empty(len(at), vocabulary))
        log_q = torch.log_softmax(g.to(loss.dtype) / temperature, 1)
        log_p = logits_of(teacher_hidden[at], teacher_weight, None, teacher_hidden.new_empty(len(at), vocabulary))
        log_p = torch.log_softmax(log_p.to(loss.dtype) / temperature, 1)
        value, gradient = _divergence(log_p, log_q, divergence)
        del log_p, log_q
        loss[at] = torch.where(counts, value * temperature**2, 0)
        if not (needs_dhidden or needs_dweight):
            continue
        by = counts * temperature if scale is None else counts * temperature * scale[at]
        g.copy_(torch.where(counts[:, None], gradient * by[:, None], 0))
        del gradient
        if needs_dhidden:
            dhidden[at] = hidden_gradient(g, weight)
        if needs_dweight:
            add_weight_gradient(dweight, g, x)
    return outputs


@torch.library.custom_op("fastft::linear_distillation", mutates_args=())
def _compute_op(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    kept: Tensor,
    scale: Tensor | None,
    divergence: str,
    temperature: float,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _compute(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        kept,
        scale,
        divergence,
        temperature,
        needs_dhidden,
        needs_dweight,
    )


@_compute_op.register_fake
def _(
    hidden, weight, teacher_hidden, teacher_weight, kept, scale, divergence, temperature, needs_dhidden, needs_dweight
):
    return _outputs(hidden, weight, needs_dhidden, needs_dweight)


def _setup_context(ctx, inputs, output):
    *tensors, _, divergence, temperature, needs_dhidden, needs_dweight = inputs
    ctx.options = divergence, temperature
    ctx.computed = needs_dhidden or needs_dweight
    ctx.head_dtype = inputs[1].dtype
    ctx.save_for_backward(*(output[1:] if ctx.computed else tensors))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, compute, dloss):
    """Gradients of the ten inputs. `compute` is the function above or the custom op around it."""
    nothing = (None,) * 10
    if dloss is None:
        return nothing
    needs = ctx.needs_input_grad[:2]
    saved, by = ctx.saved_tensors, None
    if ctx.computed:
        by = dloss[0] if len(dloss) else 0.0
    else:
        saved = compute(*saved, dloss.contiguous(), *ctx.options, *needs)[1:]
    dtypes = saved[0].dtype, ctx.head_dtype
    return (*(scaled(t, by, d) if n else None for t, n, d in zip(saved, needs, dtypes, strict=True)), *nothing[2:])


class _LinearDistillation(torch.autograd.Function):
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


def linear_distillation(
    hidden,
    weight,
    teacher_hidden,
    teacher_weight,
    labels=None,
    *,
    divergence="forward_kl",
    temperature=1.0,
    ignore_index=-100,
    reduction="mean",
    num_items=None,
):
    """The divergence of student and teacher, times temperature ** 2, so that gradients do not shrink as it grows.

    hidden: [..., H] and weight: [V, H]; teacher_hidden: [..., K] and teacher_weight: [V, K], of one dtype each (under
    autocast, of any); labels: int64 [...], whose rows with `ignore_index` count for nothing, or None where all count.
    divergence: "forward_kl", "reverse_kl" or "js" (above). reduction, num_items: as in linear_cross_entropy.
    The loss is in float32. Differentiable once in hidden and weight; the teacher gets no gradient.

    Raises ValueError for shapes, dtypes or options that do not fit.
    """
    op = "linear_distillation"
    checks.tensors(op, hidden=hidden, weight=weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)
    checks.optional_tensors(op, labels=labels)
    checks.choice(op, DIVERGENCES, divergence=divergence)
    checks.numbers(op, temperature=temperature)
    checks.whole_numbers(op, ignore_index=ignore_index)
    checks.choice(op, REDUCTIONS, reduction=reduction)
    check_num_items(op, num_items, reduction)
    hidden, weight = cast(hidden, weight)
    teacher_hidden, teacher_weight = (t.detach() for t in cast(teacher_hidden, teacher_weight))
    check_head(op, hidden, weight)
    check_head(op, teacher_hidden, teacher_weight, name="teacher_hidden")
    if teacher_hidden.shape[:-1] != hidden.shape[:-1] or teacher_hidden.device != hidden.device:
        raise ValueError(
            f"{op}: teacher_hidden is {list(teacher_hidden.shape)} on {teacher_hidden.device}; for hidden "
            f"{list(hidden.shape)} it must be {[*hidden.shape[:-1], 'K']} on {hidden.device}"
        )
    if len(teacher_weight) != len(weight):
        raise ValueError(f"{op}: the teacher's vocabulary is {len(teacher_weight)}, the student's {len(weight)}")
    if not temperature > 0:
        raise ValueError(f"{op}: temperature is {temperature}; it must be positive")
    rows = hidden.reshape(-1, hidden.shape[-1])
    if labels is None:
        kept = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    else:
        check_labels(op, hidden, labels, ignore_index, len(weight))
        kept = labels.reshape(-1) != ignore_index
    summed = reduction != "none"
    trained = [summed and torch.is_grad_enabled() and t.requires_grad for t in (rows, weight)]
    run = _compute_op if torch.compiler.is_compiling() else _LinearDistillation.apply
    teacher = teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_weight
    loss, *_ = run(rows, weight, *teacher, kept, None, divergence, float(temperature), *trained)
    if not summed:
        return loss.view(hidden.shape[:-1])
    loss = loss.sum()
    if reduction == "sum":
        return loss
    if num_items is None:
        return loss / kept.sum().clamp(min=1)
    return loss / (num_items if isinstance(num_items, Tensor) else float(num_items))
