"""Attention on the GPU, in Triton. Equation and masks: reference/attention.py. Backward: attention_backward.py.

q: [B, S, H, D] or packed [T, H, D]; k, v alike with H' heads; float32, bfloat16 or float16, adjacent elements in a head.
o: like q, contiguous; lse: float32, q's shape without D, natural logarithm.

A program computes one tile of queries of one head over all the keys that they may see: scores and exponentials (to base
2) in float32, the probabilities rounded to v's dtype for their product with v. Tiles that a mask does not cross are
computed without one. Saved for backward: q, k, v, o, lse. Memory: O(tokens). On Hopper: _attention_hopper.py.

FLOPs: forward 4 H D, backward 14 H D per visible score (both passes over the scores compute them again).
"""

import torch
import triton
import triton.language as tl

from fastft_kernels.triton import _attention_config as config
from fastft_kernels.triton import _attention_hopper, attention_backward
from fastft_kernels.triton._attention_tiles import (
    INFINITY,
    LN2,
    bounds,
    keep,
    key_range,
    load,
    place,
    store,
    tanh,
    visible,
)


@triton.jit
def forward_tiles(
    acc0,
    acc1,
    total,
    top,
    q0,
    q1,
    k_ptr,
    k_stride,
    v_ptr,
    v_stride,
    low,
    turn,
    shift,
    count,
    rows,
    offset,
    left,
    right,
    first,
    end,
    factor,
    inner,
    seed,
    row,
    head,
    threshold,
    EDGE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds a walk of keys to the softmax; EDGE: some of them are not seen by all queries."""
    for i in range(0, count):
        start = low + i * BLOCK_N
        if EDGE:
            start += tl.where(i < turn, 0, shift)
        k0 = load(k_ptr, start, k_stride, first, end, BLOCK_N, 0, D0, D, EDGE)
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            k1 = load(k_ptr, start, k_stride, first, end, BLOCK_N, D0, D1, D, EDGE)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        if SOFTCAP:
            s = tanh(s * inner)
        if EDGE:
            cols = start + tl.arange(0, BLOCK_N)
            see = visible(rows[:, None], cols[None, :], offset, left, right, first, end, LEFT, RIGHT)
            s = tl.where(see, s, -INFINITY)
        # The maximum before the multiplication, which then shares an instruction with the subtraction.
        higher = tl.maximum(top, tl.max(s, 1) * factor)
        pivot = higher
        if EDGE:
            pivot = tl.where(higher == -INFINITY, 0.0, higher)
        p = tl.exp2(s * factor - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        if DROPOUT:
            p = tl.where(keep(seed, row, start, head, threshold, BLOCK_M, BLOCK_N), p, 0.0)
        v0 = load(v_ptr, start, v_stride, first, end, BLOCK_N, 0, D0, D, EDGE)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
        if D1 > 0:
            v1 = load(v_ptr, start, v_stride, first, end, BLOCK_N, D0, D1, D, EDGE)
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, total, top


@triton.jit(do_not_specialize=["tiles", "pairs", "section", "sequences", "q_len", "k_len", "left", "right", "seed"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_lengths_ptr,
    seed_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    o_batch,
    o_row,
    o_head,
    lse_batch,
    lse_row,
    lse_head,
    tiles,
    pairs,
    section,
    sequences,
    q_len,
    k_len,
    left,
    right,
    factor,
    inner,
    seed,
    threshold,
    kept,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    SEED_THERE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, pair = place(tl.program_id(0), tiles, pairs, section, RIGHT)
    batch, head, start, q_start, k_start, q_len, k_len, first, end = bounds(
        tile,
        pair,
        HEADS,
        sequences,
        q_len,
        k_len,
        cu_seqlens_q_ptr,
        cu_seqlens_k_ptr,
        key_lengths_ptr,
        False,
        PACKED,
        PADDED,
        BLOCK_M,
    )
    if start >= q_len:
        return
    b, h = batch.to(tl.int64), head.to(tl.int64)
    q_start, k_start = tl.cast(q_start, tl.int64), tl.cast(k_start, tl.int64)
    q_ptr += b * q_batch + h * q_head + q_start * q_row
    k_ptr += b * k_batch + h // GROUP * k_head + k_start * k_row
    v_ptr += b * v_batch + h // GROUP * v_head + k_start * v_row
    o_ptr += b * o_batch + h * o_head + q_start * o_row
    lse_ptr += b * lse_batch + h * lse_head + q_start * lse_row
    offset = k_len - q_len
    rows = start + tl.arange(0, BLOCK_M)
    full_low, full_count, low, before, jump, count = key_range(
        start, q_len, offset, left, right, first, end, LEFT, RIGHT, BLOCK_M, BLOCK_N
    )
    if SEED_THERE:
        seed = tl.load(seed_ptr)
    row = q_start.to(tl.int32) + start
    number = pair  # head + batch * HEADS: the head that dropout counts by

    q0 = load(q_ptr, start, q_row, 0, q_len, BLOCK_M, 0, D0, D, True)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -INFINITY, tl.float32)
    q1, acc1 = q0, total
    if D1 > 0:
        q1 = load(q_ptr, start, q_row, 0, q_len, BLOCK_M, D0, D1, D, True)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)

    for part in tl.static_range(2):  # the full tiles, then those that a mask crosses
        if part == 0:
            lo, turn, shift, tiles_here = full_low, full_count, 0, full_count
        else:
            lo, turn, shift, tiles_here = low, before, jump, count
        acc0, acc1, total, top = forward_tiles(
            acc0,
            acc1,
            total,
            top,
            q0,
            q1,
            k_ptr,
            k_row,
            v_ptr,
            v_row,
            lo,
            turn,
            shift,
            tiles_here,
            rows,
            offset,
            left,
            right,
            first,
            end,
            factor,
            inner,
            seed,
            row,
            number,
            threshold,
            part == 1,
            LEFT,
            RIGHT,
            SOFTCAP,
            DROPOUT,
            PRECISION,
            D,
            D0,
            D1,
            BLOCK_M,
            BLOCK_N,
        )

    blind = total == 0.0
    divisor = tl.where(blind, 0.0, kept / tl.where(blind, 1.0, total))
    store(o_ptr, start, o_row, q_len, acc0 * divisor[:, None], BLOCK_M, 0, D0, D)
    if D1 > 0:
        store(o_ptr, start, o_row, q_len, acc1 * divisor[:, None], BLOCK_M, D0, D1, D)
    lse = tl.where(blind, -INFINITY, (top + tl.log2(total)) * LN2)
    tl.store(lse_ptr + rows.to(tl.int64) * lse_row, lse, rows < q_len)


def forward(q, k, v, scale, left, right, softcap, cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_p, seed):
    """(o, lse). key_lengths: int [B] or [B, 2]; seed: int64 tensor of one, on any device."""
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Rows are adjacent in memory, as programs write them.
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32).transpose(-1, -2)
    if not q.numel():
        return o, lse
    if not k.numel():
        return o.zero_(), lse.fill_(-torch.inf)
    call = config.Call(q, k, v, scale, left, right, softcap, cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_p, seed)
    kernel, blocks = _attention_hopper.choose("forward", forward_kernel, call)
    tiles = call.tiles(call.q, blocks[0])
    pairs = call.pairs(call.q)
    with torch.cuda.device_of(q):
        config.launch(
            kernel,
            tiles * pairs,
            call.q,
            call.k,
            call.v,
            o,
            lse,
            *call.pointers,
            *config.strides(call.q, call.k, call.v, config.batched(o), config.batched(lse, 3)),
            tiles,
            pairs,
            call.section(call.q.shape[2], pairs),
            *call.numbers,
            blocks=blocks,
            **call.constants,
        )
    return o, lse


backward = attention_backward.backward
why_not = config.why_not
