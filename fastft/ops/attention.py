"""Attention over padded or packed batches: causal or not, grouped heads, windows, soft-capping, dropout.

    s = scale * q kᵀ,   s = softcap * tanh(s / softcap),   p = softmax(s over the allowed keys),   o = dropout(p) v

A kernel module has `forward(q, k, v, *settings) -> (o, lse)` and `backward(do, dlse, q, k, v, o, lse, *settings) ->
(dq, dk, dv)`, settings as in `_SETTINGS`: `causal` is right = 0, and dlse is None where nothing depends on lse. The
reference is differentiated by PyTorch; under torch.compile its backward computes the forward again, with the same dropout.
"""

import contextlib
import os

import torch
from torch.autograd.function import once_differentiable

from fastft.ops import checks, dispatch
from fastft.ops.dropout import check_random
from fastft_kernels.reference.attention import attention as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_CHECK_EVERYWHERE = os.environ.get("FASTFT_CHECK") == "1"
_SETTINGS = (
    "float scale, int? left, int? right, float? softcap, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? key_lengths, float dropout_p, Tensor? seed"
)


def _why_not_triton(q, k, v, scale):
    if q.dtype == torch.float64:
        return "it computes float32, bfloat16 and float16, and q is torch.float64"
    if not scale > 0:
        return f"it takes a scale above 0, and this one is {scale}"
    return _KERNELS["triton"].why_not(q.device, q.shape[-1])


def _why_not_cpp(q, k, v, scale):
    if q.dtype == torch.float64:
        return "it computes float32, bfloat16 and float16, and q is torch.float64"
    return None


_KERNELS = dispatch.register("attention", triton=_why_not_triton, cpp=_why_not_cpp)


def _reference(q, k, v, scale, left, right, softcap, cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_p, seed, lse):
    """(o, lse), where a lse that nobody asked for is an empty tensor: a custom op cannot return None."""
    result = reference(
        q,
        k,
        v,
        scale=scale,
        window=(left, right),
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        key_lengths=key_lengths,
        dropout_p=dropout_p,
        seed=seed,
        return_lse=lse,
    )
    return result if lse else (result, q.new_empty(0, dtype=torch.float32))


def _forward(q, k, v, *settings):
    *settings, return_lse, backend = settings
    if backend == "reference":
        return _reference(q, k, v, *settings, return_lse)
    return _KERNELS[backend].forward(q, k, v, *settings)


def _backward(do, dlse, q, k, v, o, lse, *settings):
    *settings, return_lse, backend = settings
    if backend != "reference":
        return _KERNELS[backend].backward(do, dlse, q, k, v, o, lse, *settings)
    # autograd.grad would find nothing: a custom op runs with autograd dispatched away, whatever the grad mode.
    (_, lse), gradients = torch.func.vjp(lambda q, k, v: _reference(q, k, v, *settings, return_lse), q, k, v)
    return gradients((do, torch.zeros_like(lse) if dlse is None else dlse))


def _setup_context(ctx, inputs, output):
    o, lse = output
    *settings, return_lse, backend = inputs[3:]
    tensors = {i: x for i, x in enumerate(settings) if isinstance(x, torch.Tensor)}
    # The reference computes o and lse again: where they are not needed they are not kept.
    results = (lse[:0], lse[:0]) if backend == "reference" else (o, lse)
    ctx.save_for_backward(*inputs[:3], *results, *tensors.values())
    ctx.positions = tuple(tensors)
    ctx.settings = [None if i in tensors else x for i, x in enumerate(settings)] + [return_lse, backend]
    if not return_lse:
        ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, do, dlse):
    """Gradients of the inputs. `backward` is the function above or the custom op around it."""
    q, k, v, o, lse, *tensors = ctx.saved_tensors
    settings = list(ctx.settings)
    for i, x in zip(ctx.positions, tensors, strict=True):
        settings[i] = x
    do = torch.zeros_like(q) if do is None else do
    return *backward(do, dlse, q, k, v, o, lse, *settings), *(None for _ in settings)


class _Attention(torch.autograd.Function):
    """The eager path of the kernels: less than half the dispatch cost of a custom op."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        return _gradients(ctx, _backward, do, dlse)


@torch.library.custom_op(
    "fastft::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_SETTINGS}, bool return_lse, str backend) -> (Tensor, Tensor)",
)
def _op(q, k, v, *settings):
    return tuple(x.contiguous() for x in _forward(q, k, v, *settings))


@_op.register_fake
def _(q, k, v, *settings):
    has_lse = settings[-2] or settings[-1] != "reference"
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1] if has_lse else 0, dtype=torch.float32)


@torch.library.custom_op(
    "fastft::attention_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_SETTINGS}, "
    "bool return_lse, str backend) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(do, dlse, q, k, v, o, lse, *settings):
    return tuple(x.contiguous() for x in _backward(do, dlse, q, k, v, o, lse, *settings))


@_backward_op.register_fake
def _(do, dlse, q, k, v, *others):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


_op.register_autograd(lambda ctx, do, dlse: _gradients(ctx, _backward_op, do, dlse), setup_context=_setup_context)


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    scale=None,
    window=None,
    softcap=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    key_lengths=None,
    dropout_p=0.0,
    seed=None,
    return_lse=False,
):
    """o, or (o, lse) with `return_lse`.

    q: [B, S, H, D], or packed [T, H, D]; k, v: [B, S', H', D] or [T', H', D], H a multiple of H', D at most 256; one
    floating dtype for the three (under autocast they are cast to its dtype). o: like q. lse: q's shape without D,
    float32, the natural logarithm of the sum of exponentials, before dropout.

    causal          query i sees no key past its position i + S' - S: the last query stands on the last key
    scale           by default 1 / sqrt(D)
    window          (left, right): the keys position - left ... position + right; None is no limit on that side
    softcap         scores become softcap * tanh(scores / softcap)
    cu_seqlens_q/k  int32 [n + 1], on q's device: where each packed sequence starts, then T; k's is q's by default
    max_seqlen_q/k  at least the length of the longest sequence; spares a kernel from asking the device
    key_lengths     int [B]: how many keys each padded example has, or [B, 2]: its first key and the one after its last
    dropout_p       probability that a score is dropped, from 0 to below 1
    seed            int or int64 tensor: the same seed drops the same scores; by default drawn from torch's CPU generator

    A query that may see nothing gives 0, a lse of -inf and zero gradients. Differentiable once in q, k and v, also
    through lse. Raises ValueError, naming the argument and both values, for what does not fit; the contents of cu_seqlens
    and key_lengths are looked at on the CPU only (everywhere under FASTFT_CHECK=1), as asking a GPU would wait for it.
    Raises BackendError where a backend that was asked for cannot serve.
    """
    _check_types(q, k, v, cu_seqlens_q, cu_seqlens_k, key_lengths, causal, return_lse)
    checks.optional_numbers(
        "attention", scale=scale, softcap=softcap, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k
    )
    _check(q, k, v, causal, window, softcap)
    check_random("attention", dropout_p, seed, "dropout_p")
    if cu_seqlens_q is None:
        _check_padded(q, k, cu_seqlens_k, key_lengths)
    else:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_lengths)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    device = q.device.type
    is_autocast = checks.autocasts(device)
    if is_autocast:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    backend = dispatch.choose("attention", q, k, v, scale)
    if dropout_p and seed is None:
        seed = torch.randint(2**63 - 1, ())  # on the CPU whatever the device: checkpointing restores that generator
    elif dropout_p and not isinstance(seed, torch.Tensor):
        seed = torch.tensor(seed)
    left, right = (None, None) if window is None else window
    sequences = cu_seqlens_q, cu_seqlens_k, key_lengths
    settings = (
        scale,
        left,
        0 if causal else right,
        softcap,
        *sequences,
        dropout_p,
        seed if dropout_p else None,
        return_lse,
    )
    is_plain = backend == "reference" or not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
    run = _op if torch.compiler.is_compiling() else _forward if is_plain else _Attention.apply
    # Entering a context costs as much as a short sequence: only where there is something to leave.
    with torch.autocast(device, enabled=False) if is_autocast else contextlib.nullcontext():
        o, lse = run(q, k, v, *settings, backend)
    return (o, lse) if return_lse else o


def _check_types(q, k, v, cu_seqlens_q, cu_seqlens_k, key_lengths, causal, return_lse):
    checks.tensors("attention", q=q, k=k, v=v)
    checks.optional_tensors("attention", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, key_lengths=key_lengths)
    checks.flags("attention", causal=causal, return_lse=return_lse)


def check_window(op, window):
    """TypeError unless window is a pair of whole numbers or None, ValueError for negative ones."""
    if window is None:
        return
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{op}: window is {checks.shown(window)}; it must be (left, right), or None for no limit")
    for name, side in zip(("window's left side", "window's right side"), window, strict=True):
        if side is not None:
            checks.whole_numbers(op, 0, **{name: side})


class _Shapes:
    """Written only where a message needs it, which takes longer than the checks."""

    def __init__(self, q, k, v):
        self.tensors = q, k, v

    def __str__(self):
        return ", ".join(f"{name} {list(x.shape)}" for name, x in zip("qkv", self.tensors, strict=True))


def _check(q, k, v, causal, window, softcap):
    shapes = _Shapes(q, k, v)
    if q.dim() not in (3, 4) or k.dim() != q.dim() or k.shape != v.shape:
        raise ValueError(f"attention: {shapes}: q must be [B, S, H, D] or packed [T, H, D], k and v alike of one shape")
    heads, heads_k = q.shape[-2], k.shape[-2]
    if q.shape[-1] != k.shape[-1] or not 0 < q.shape[-1] <= 256:
        raise ValueError(f"attention: {shapes}: the last dimension must be the same for all, from 1 to 256")
    if heads_k == 0 or heads % heads_k:
        raise ValueError(f"attention: {shapes}: the {heads} heads of q must be a multiple of the {heads_k} of k and v")
    if q.dim() == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: {shapes}: the batches of q and k must be equally large")
    is_one_kind = q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    if q.dtype not in _DTYPES or not (is_one_kind or checks.autocasts(q.device.type)):
        kinds = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in zip("qkv", (q, k, v), strict=True))
        raise ValueError(f"attention: {kinds}: q, k and v must have one floating dtype and device")
    check_window("attention", window)
    if causal and window is not None and window[1]:
        raise ValueError(
            f"attention: causal=True and window {window} contradict each other: make the right side 0 or None"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap {softcap}: must be above 0, or None")


def _check_padded(q, k, cu_seqlens_k, key_lengths):
    if q.dim() == 3 or cu_seqlens_k is not None:
        raise ValueError(
            f"attention: q {list(q.shape)} without cu_seqlens_q: packed sequences need it, and q as [T, H, D]"
        )
    if key_lengths is None:
        return
    if key_lengths.shape not in ((q.shape[0],), (q.shape[0], 2)) or key_lengths.dtype not in _INTEGERS:
        raise ValueError(
            f"attention: key_lengths {list(key_lengths.shape)} of {key_lengths.dtype}: must be integers [{q.shape[0]}] or "
            f"[{q.shape[0]}, 2] for q {list(q.shape)}"
        )
    if _readable(key_lengths):
        first, end = key_lengths.unbind(1) if key_lengths.dim() == 2 else (key_lengths.new_zeros(()), key_lengths)
        if key_lengths.numel() and not ((first >= 0) & (first <= end) & (end <= k.shape[1])).all():
            raise ValueError(
                f"attention: key_lengths {key_lengths.tolist()}: must lie within the {k.shape[1]} keys of k"
            )


def _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_lengths):
    if q.dim() == 4 or key_lengths is not None:
        raise ValueError(
            f"attention: cu_seqlens_q with q {list(q.shape)}: packed sequences are [T, H, D], without key_lengths"
        )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        counts = cu_seqlens_q.numel() - 1, cu_seqlens_k.numel() - 1
        raise ValueError(
            f"attention: cu_seqlens_q has {counts[0]} sequences and cu_seqlens_k {counts[1]}: must be as many"
        )
    _check_cu_seqlens("q", cu_seqlens_q, q, max_seqlen_q)
    if cu_seqlens_k is not cu_seqlens_q or k.shape[0] != q.shape[0] or max_seqlen_k != max_seqlen_q:
        _check_cu_seqlens("k", cu_seqlens_k, k, max_seqlen_k)


def _check_cu_seqlens(name, cu_seqlens, x, max_seqlen):
    if (
        cu_seqlens.dim() != 1
        or not cu_seqlens.numel()
        or cu_seqlens.dtype != torch.int32
        or cu_seqlens.device != x.device
    ):
        raise ValueError(
            f"attention: cu_seqlens_{name} is {list(cu_seqlens.shape)} of {cu_seqlens.dtype} on {cu_seqlens.device}: must be "
            f"[sequences + 1] of torch.int32 on {x.device}"
        )
    if cu_seqlens.is_meta:
        raise ValueError(f"attention: cu_seqlens_{name} is on meta; where sequences start must be known")
    if not _readable(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != x.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(
            f"attention: cu_seqlens_{name} {bounds}: must rise from 0 to the {x.shape[0]} tokens of {name}"
        )
    if max_seqlen is not None and max_seqlen < max(lengths, default=0):
        raise ValueError(f"attention: max_seqlen_{name} {max_seqlen}: the longest sequence has {max(lengths)} tokens")


def _readable(x):
    """Whether the contents may be looked at: a traced tensor has none, and a GPU would have to be waited for."""
    return not torch.compiler.is_compiling() and (x.device.type == "cpu" or _CHECK_EVERYWHERE)
