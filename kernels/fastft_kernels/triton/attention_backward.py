"""Gradients of attention in Triton, in three passes of which none adds to another's result: deterministic, no atomics.

    delta = sum over D of do * o - dlse
    ds = p * (dropout(do vᵀ) - delta) * (1 - tanh²)        tanh only with a softcap
    dv = dropout(p)ᵀ do,   dk = scale * dsᵀ q              _attention_dkdv.py, over all heads that share the keys
    dq = scale * ds k                                      _attention_dq.py

p is computed again from lse. Rounded to the dtype of q: p and ds, for these products. On Hopper: _attention_hopper.py.
"""

import torch
import triton
import triton.language as tl

from fastft_kernels.triton import _attention_config as config
from fastft_kernels.triton import _attention_hopper
from fastft_kernels.triton._attention_dkdv import dkdv_kernel
from fastft_kernels.triton._attention_dq import dq_kernel
from fastft_kernels.triton._attention_tiles import INFINITY, LOG2_E, load


@triton.jit(do_not_specialize=["q_len", "total"])
def delta_kernel(
    do_ptr,
    o_ptr,
    dlse_ptr,
    lse_ptr,
    delta_ptr,
    lse2_ptr,
    do_batch,
    do_row,
    do_head,
    o_batch,
    o_row,
    o_head,
    dlse_batch,
    dlse_row,
    dlse_head,
    lse_batch,
    lse_row,
    lse_head,
    q_len,
    total,
    HEADS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta, and lse to base 2, both [pairs, total]; for rows that see nothing 0 and +inf, which makes p and ds zero.

    delta is finite, so that p = 0 makes ds zero whatever the row: where it would not be, 0 and NaN, which spoils p instead.
    """
    tiles = tl.cdiv(q_len, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = pair // HEADS, pair % HEADS
    start = tl.program_id(0) % tiles * BLOCK_M
    do = load(do_ptr + b * do_batch + h * do_head, start, do_row, 0, q_len, BLOCK_M, 0, BLOCK_D, D, True)
    o = load(o_ptr + b * o_batch + h * o_head, start, o_row, 0, q_len, BLOCK_M, 0, BLOCK_D, D, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    rows = start + tl.arange(0, BLOCK_M)
    there = rows < q_len
    wide = rows.to(tl.int64)
    lse = tl.load(lse_ptr + b * lse_batch + h * lse_head + wide * lse_row, there, other=0.0)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + b * dlse_batch + h * dlse_head + wide * dlse_row, there, other=0.0)
    blind = lse == -INFINITY
    finite = tl.abs(delta) < INFINITY
    lse2 = tl.where(blind, INFINITY, tl.where(finite, lse * LOG2_E, float("nan")))
    tl.store(delta_ptr + pair * total + rows, tl.where(finite & ~blind, delta, 0.0), there)
    tl.store(lse2_ptr + pair * total + rows, lse2, there)


def backward(
    do,
    dlse,
    q,
    k,
    v,
    o,
    lse,
    scale,
    left,
    right,
    softcap,
    cu_seqlens_q,
    cu_seqlens_k,
    key_lengths,
    dropout_p,
    seed,
):
    """(dq, dk, dv), contiguous. dlse is None where nothing depends on lse."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    call = config.Call(q, k, v, scale, left, right, softcap, cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_p, seed)
    do, o, lse = config.batched(do), config.batched(o), config.batched(lse, 3)
    dlse_there = lse if dlse is None else config.batched(dlse, 3)
    heads, heads_k, rows = call.q.shape[2], call.k.shape[2], call.q.shape[1]
    pairs, pairs_k = call.pairs(call.q), call.pairs(call.k)
    total = triton.cdiv(rows, 4) * 4  # where bulk copies may start: multiples of 16 bytes
    delta, lse2 = q.new_empty(2, pairs, total, dtype=torch.float32)
    with torch.cuda.device_of(q):
        delta_kernel[(triton.cdiv(rows, 64) * pairs,)](
            do,
            o,
            dlse_there,
            lse,
            delta,
            lse2,
            *config.strides(do, o, dlse_there, lse),
            rows,
            total,
            HEADS=heads,
            HAS_DLSE=dlse is not None,
            D=q.shape[-1],
            BLOCK_D=triton.next_power_of_2(q.shape[-1]),
            BLOCK_M=64,
            num_warps=4,
            enable_fp_fusion=True,
        )
        # Registers hold both accumulators up to 128 columns; wider heads pay one more product for two launches.
        for name in ("dkdv",) if q.shape[-1] <= 128 else ("dk", "dv"):
            kernel, blocks = _attention_hopper.choose(name, dkdv_kernel, call, do)
            tiles = call.tiles(call.k, blocks[1])
            config.launch(
                kernel,
                tiles * pairs_k,
                call.q,
                call.k,
                call.v,
                do,
                lse2,
                delta,
                dk,
                dv,
                *call.pointers,
                *config.strides(call.q, call.k, call.v, do, config.batched(dk)),
                total,
                scale,
                tiles,
                pairs_k,
                call.section(heads_k, pairs_k),
                *call.numbers,
                blocks=blocks,
                DK="dk" in name,
                DV="dv" in name,
                **call.constants,
            )
        kernel, blocks = _attention_hopper.choose("dq", dq_kernel, call, do)
        tiles = call.tiles(call.q, blocks[0])
        config.launch(
            kernel,
            tiles * pairs,
            call.q,
            call.k,
            call.v,
            do,
            lse2,
            delta,
            dq,
            *call.pointers,
            *config.strides(call.q, call.k, call.v, do, config.batched(dq)),
            total,
            scale,
            tiles,
            pairs,
            call.section(heads, pairs),
            *call.numbers,
            blocks=blocks,
            **call.constants,
        )
    return dq, dk, dv
