"""Attention over padded or packed batches, in plain differentiable PyTorch.

    s = scale * q kᵀ,   s = softcap * tanh(s / softcap),   p = softmax(s over the allowed keys),   o = dropout(p) v

Query i of a sequence of n queries and m keys stands at key position i + m - n (bottom-right alignment). It may see key
j of the same sequence iff position - left <= j <= position + right; `causal` means right = 0. A query that may see
nothing gives o = 0, lse = -inf and zero gradients.

Packed rows never build a score matrix across sequences: `_segments.py` gathers them into a few batches of nearly equal
length. Without dropout, softcap and lse PyTorch's fused attention computes such a batch and keeps no scores; otherwise
the scores exist, in fp32.
"""

import torch
import torch.nn.functional as F

from fastft_kernels.reference import _philox, _segments


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
    """Arguments and results as `fastft.ops.attention`, which also checks them.

    `max_seqlen_q` and `max_seqlen_k` are for kernels that launch a grid; the reference does without.
    Saved for backward: q, k, v; where the scores exist also probabilities and dropout mask, 4 bytes each per score.
    """
    left, right = (None, None) if window is None else window
    right = 0 if causal else right
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if dropout_p and seed is None:
        seed = torch.randint(2**63 - 1, ())
    random = (dropout_p, int(seed)) if dropout_p else None
    explicit = bool(random or softcap or return_lse)
    half = q.dtype in (torch.float16, torch.bfloat16)
    # Without tile instructions PyTorch's bf16 attention on a CPU takes eight times as long as the same in fp32.
    dtype = torch.float32 if half and (explicit or q.device.type == "cpu") else q.dtype

    def compute(batch, rows):
        return (
            _explicit(*batch, rows, scale, softcap, random, return_lse) if explicit else (_fused(*batch, scale), None)
        )

    if not q.numel() or not k.numel():
        out, lse = _nothing(q, k, v)
    elif cu_seqlens_q is None:
        mask = _padded_mask(q.shape[1], k.shape[1], key_lengths, left, right, q.device)
        out, lse = compute((*(x.transpose(1, 2).to(dtype) for x in (q, k, v)), mask), None)
        out, lse = out.transpose(1, 2).to(q.dtype), lse.transpose(1, 2) if return_lse else None
    else:
        multiple = 8 if explicit else 1  # softmax works on whole vectors
        segments = _segments.plan(cu_seqlens_q, cu_seqlens_k, q.shape[1], k.shape[1], left, right, multiple)
        batches = segments.batches(q, k, v, dtype)
        if not batches:
            out, lse = _nothing(q, k, v)
        else:
            rows = segments.queries.tokens() if random else [None] * len(batches)
            out, lse = zip(*map(compute, batches, rows), strict=True)
            out, lse = segments.unpack(out, q.dtype), segments.unpack_lse(lse) if return_lse else None
    return (out, lse) if return_lse else out


def _nothing(q, k, v):
    """Zeros and -inf, with zero gradients for q, k and v."""
    out = (q + k.sum() + v.sum()).masked_fill(torch.ones_like(q, dtype=torch.bool), 0)
    return out, torch.full(q.shape[:-1], -torch.inf, device=q.device)


def _padded_mask(Sq, Sk, key_lengths, left, right, device):
    """The mask of a padded batch: bottom-right alignment of the padded shapes, then the keys of each example."""
    if key_lengths is None and left is None and (right is None or right == 0 and Sq == Sk):
        return _segments.Mask(Sq, Sk, device, causal=right == 0)
    end = torch.full((1,), Sk, device=device) if key_lengths is None else key_lengths.long()
    first, end = end.unbind(1) if end.dim() == 2 else (torch.zeros_like(end), end)
    return _segments.band(Sq, Sk, torch.full_like(end, Sk - Sq), first, end, left, right)


def _fused(q, k, v, mask, scale):
    """One batch, q [n, H, Sq, D], by PyTorch's fused attention. Returns o [n, H, Sq, D]."""
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.allowed, is_causal=mask.causal, scale=scale, enable_gqa=grouped
    )
    return out if mask.blind is None else out.masked_fill(mask.blind, 0)


def _explicit(q, k, v, mask, rows, scale, softcap, random, return_lse):
    """One batch, q [n, H, Sq, D], with its scores in memory. Returns (o, lse [n, H, Sq] or None).

    rows: int64 [n, Sq], the rows of the packed tensor that the queries are, or None for a padded batch.
    """
    n, H, Sq, D = q.shape
    heads, Sk = k.shape[1:3]
    # The query heads that share a key head become rows of one product: no copy of k and v for each of them.
    q = (q * scale).reshape(n * heads, -1, D)
    k, v = k.reshape(n * heads, Sk, D), v.reshape(n * heads, Sk, D)
    scores = _Scores.apply(q, k).view(n, heads, -1, Sq, Sk)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask.bias is not None:
        scores = scores.add_(mask.bias[:, :, None])
    probabilities = scores.softmax(-1)
    lse = scores.logsumexp(-1).view(n, H, Sq) if return_lse else None
    if random:
        keep = _keep(n, H, Sq, Sk, rows, *random, q.device).view(probabilities.shape)
        probabilities = probabilities * keep.to(probabilities.dtype).mul_(
            65536 / (65536 - _philox.drop_threshold(random[0]))
        )
    out = torch.bmm(probabilities.view(n * heads, -1, Sk), v).view(n, H, Sq, D)
    if mask.blind is not None:
        out = out.masked_fill(mask.blind, 0)
        lse = lse.masked_fill(mask.blind.squeeze(-1), -torch.inf) if return_lse else None
    return out, lse


def _keep(n, H, Sq, Sk, rows, p, seed, device):
    """bool [n, H, Sq, Sk]: the scores that dropout keeps."""
    head = torch.arange(H, device=device)[:, None, None]
    if rows is None:
        head = head + H * torch.arange(n, device=device)[:, None, None, None]
        row = torch.arange(Sq, device=device)[:, None]
    else:
        row = rows[:, None, :, None]
    block = torch.arange(-(-Sk // 8), device=device)
    return _philox.draws(seed, block, row, head, 1).flatten(-2)[..., :Sk] >= _philox.drop_threshold(p)


class _Scores(torch.autograd.Function):
    """q kᵀ. Autograd's own gradient of k comes out transposed: a slower product and a copy."""

    @staticmethod
    def forward(q, k):
        return torch.bmm(q, k.transpose(1, 2))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        q, k = ctx.saved_tensors
        return torch.bmm(grad, k), torch.bmm(grad.transpose(1, 2), q)
