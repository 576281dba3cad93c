"""Attention on the CPU: Python face of csrc/cpu/attention_*.cpp. Equation: reference/attention.py.

q, o: [B, S, H, D] or [T, H, D]; k, v: [B, S', H', D] or [T', H', D]; lse: float32, q's shape without D. Any strides;
results are contiguous, but rows of lse are adjacent in memory. float32, bfloat16 or float16, all computed in float32; but
bfloat16 on AVX512-BF16 or AMX in products of bfloat16, P and dS rounded to it, with sums and softmax in float32.
The code for AMX has run on an emulator only, never on a CPU that has it.
Saved for backward: q, k, v, o, lse; dropout's mask is drawn again from the seed (reference/_philox.py).
The numbers do not depend on the thread count; their last bits depend on the instruction set (fused multiply-adds).

Multiplications, for s scores that are seen: forward 2 s D, backward 5 s D.
"""

from array import array

import torch

from fastft_kernels.cpp.extension import DTYPES, C, address
from fastft_kernels.reference._philox import drop_threshold

_UNLIMITED = 2**40


def forward(q, k, v, scale, left, right, softcap, cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_p, seed):
    """(o, lse). key_lengths: int [B] or [B, 2]; seed: int or int64 tensor of one."""
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32).transpose(-1, -2)
    q, k, v = (_rows(x) for x in (q, k, v))
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k, key_lengths)
    shape = _shape(q, k, v, lse, None, None, left, right, cu_seqlens_q, dropout_p)
    C.attention_forward(
        shape.buffer_info()[0],
        address(q),
        address(k),
        address(v),
        *map(address, sequences),
        address(o),
        address(lse),
        *_numbers(q, scale, softcap, dropout_p, seed),
    )
    return o, lse


def backward(
    do, dlse, q, k, v, o, lse, scale, left, right, softcap, cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_p, seed
):
    """(dq, dk, dv); dlse is None where nothing depends on lse."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    do, q, k, v = (_rows(x) for x in (do, q, k, v))
    o = o.contiguous()
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k, key_lengths)
    shape = _shape(q, k, v, lse, do, dlse, left, right, cu_seqlens_q, dropout_p)
    C.attention_backward(
        shape.buffer_info()[0],
        address(do),
        address(dlse),
        address(q),
        address(k),
        address(v),
        address(o),
        address(lse),
        *map(address, sequences),
        address(dq),
        address(dk),
        address(dv),
        *_numbers(q, scale, softcap, dropout_p, seed),
    )
    return dq, dk, dv


def _rows(x):
    """x with the elements of a head adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sequences(cu_seqlens_q, cu_seqlens_k, key_lengths):
    """Contiguous, in the integers that the extension reads; the caller holds them while it runs."""
    if cu_seqlens_q is not None:
        return cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), None
    if key_lengths is None:
        return None, None, None
    bounds = key_lengths.long()
    if bounds.dim() == 1:
        bounds = torch.stack((torch.zeros_like(bounds), bounds), 1)
    return None, None, bounds.contiguous()


def _shape(q, k, v, lse, do, dlse, left, right, cu_seqlens_q, dropout_p):
    """AttentionShape of csrc/cpu/attention.h."""
    batch, queries, keys = (1, 0, 0) if q.dim() == 3 else (q.shape[0], q.shape[1], k.shape[1])
    sides = (_UNLIMITED if side is None else min(side, _UNLIMITED) for side in (left, right))
    numbers = array("q", (batch if cu_seqlens_q is None else cu_seqlens_q.numel() - 1, q.shape[-2], k.shape[-2]))
    numbers.extend((q.shape[-1], queries, keys, q.shape[:-2].numel(), *sides, drop_threshold(dropout_p)))
    for x, kept in ((q, 3), (k, 3), (v, 3), (lse, 2), (do, 3), (dlse, 2)):
        strides = (0, 0, 0) if x is None else (0, *x.stride())[-kept - 1 :]  # of batch, row, head: 0 for no batch
        numbers.extend(strides[:3])
    return numbers


def _numbers(q, scale, softcap, dropout_p, seed):
    seed = int(seed) & (2**64 - 1) if dropout_p else 0
    return scale, softcap or 0.0, seed, DTYPES[q.dtype], torch.get_num_threads()
